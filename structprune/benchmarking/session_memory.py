"""Run as a program: prints by how many bytes this process grows at most while a runtime loads and runs a file.

It imports nothing of the package, so that little lies in memory beside what is measured.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _onnxruntime(file: str, threads: int) -> Callable[[dict[str, Any]], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(None, feed)


def _openvino(file: str, threads: int) -> Callable[[dict[str, Any]], object]:
    openvino: Any = importlib.import_module("openvino")
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(file, "CPU", options).create_infer_request()
    return request.infer


LOAD = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def main(runtime: str, file: str, inputs: str, threads: str) -> None:
    """Load the file, run it twice on the arrays of an ``.npz`` file, and print the growth."""
    import numpy as np

    importlib.import_module(runtime)
    before = _status("VmRSS")
    with np.load(inputs) as held:
        feed = {name: held[name] for name in held.files}
    run = LOAD[runtime](file, int(threads))
    for _ in range(2):
        run(feed)
    sys.stdout.write(str(max(0, _status("VmHWM") - before)))


if __name__ == "__main__":
    main(*sys.argv[1:])
