"""Prune a vision transformer of timm (random weights) and time it: ``python examples/timm_vit.py``.

No option says how many heads there are: the attributes that the forward reads are set to what the new shapes need.
"""

import _torchvision  # noqa: F401  (only for a torchvision that does not fit torch)
import timm
import torch

import structprune
from structprune.benchmarking import benchmark


def main():
    torch.manual_seed(0)
    model, images = timm.create_model("deit_tiny_patch16_224").eval(), torch.randn(1, 3, 224, 224)

    plan = structprune.plan(model, images, ratio=0.5)
    slim = plan.apply(model)
    print(structprune.verify(model, slim, plan, images))
    for name in ("num_heads", "head_dim"):
        print(f"blocks.0.attn.{name}: {getattr(model.blocks[0].attn, name)} -> {getattr(slim.blocks[0].attn, name)}")

    print("before:", structprune.cost(model, images))
    print("after: ", structprune.cost(slim, images))
    print(benchmark({"dense": model, "slim": slim}, images, runs=20))


if __name__ == "__main__":
    main()
