"""Run as a program: prints by how many bytes this process grows at most while ONNX Runtime loads and runs a file.

It imports nothing of the package, so that little lies in memory beside what is measured.
"""

import sys
from pathlib import Path


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main(file: str, inputs: str, threads: str) -> None:
    """Load the ONNX file, run it twice on the arrays of an ``.npz`` file, and print the growth."""
    import numpy as np
    import onnxruntime

    before = _status("VmRSS")
    with np.load(inputs) as held:
        feed = {name: held[name] for name in held.files}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    for _ in range(2):
        session.run(None, feed)
    sys.stdout.write(str(max(0, _status("VmHWM") - before)))


if __name__ == "__main__":
    main(*sys.argv[1:])
