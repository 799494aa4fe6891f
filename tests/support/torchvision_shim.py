"""Lets torchvision be imported where its compiled operators do not fit the installed build of torch.

A torchvision built for CUDA beside a torch built for the CPU cannot load its own library, and then ``import
torchvision`` fails with "operator torchvision::nms does not exist", because it registers shapes for operators that
nobody has declared. Its models need none of them. timm and transformers import torchvision too.

This belongs to the tests, the benchmarks and the examples; the package itself never imports torchvision.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_DECLARATIONS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# Declarations live as long as the library object that made them.
_libraries: list[torch.library.Library] = []


def compiled_operators_load() -> bool:
    """Whether torchvision's compiled library loads; true as well where torchvision is not installed.

    The library is loaded by itself: a failed ``import torchvision`` would leave half of its modules behind.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    libraries = [path for path in Path(spec.origin).parent.glob("_C.*") if path.suffix in {".so", ".pyd", ".dylib"}]
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError:
        return False
    return True


def make_torchvision_importable() -> bool:
    """Declare the missing operators, if and only if torchvision is broken without them.

    Returns:
        Whether anything had to be declared. A second call does nothing.
    """
    if _libraries or compiled_operators_load():
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for declaration in _DECLARATIONS.values():
        library.define(declaration)
    _libraries.append(library)
    return True
