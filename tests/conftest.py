"""What every test file needs: one thread for each worker, and a torchvision that imports."""

from __future__ import annotations

import torch
from support.torchvision_shim import make_torchvision_importable

# Before any test module is imported: timm and transformers import torchvision with the model.
make_torchvision_importable()
# The runner starts one process for each core.
torch.set_num_threads(1)
