"""Lets the examples run where torchvision was built for another torch; with one that fits, it does nothing."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from support.torchvision_shim import make_torchvision_importable

make_torchvision_importable()
