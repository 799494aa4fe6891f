"""Prune torchvision's ResNet-50 (random weights) and time it: ``python examples/torchvision_resnet50.py``."""

import _torchvision  # noqa: F401  (only for a torchvision that does not fit torch)
import torch
from torchvision.models import resnet50

import structprune
from structprune.benchmarking import benchmark


def main():
    torch.manual_seed(0)
    model, images = resnet50().eval(), torch.randn(1, 3, 224, 224)

    plan = structprune.plan(model, images, ratio=0.5)
    slim = plan.apply(model)
    print(structprune.verify(model, slim, plan, images))

    print("before:", structprune.cost(model, images))
    print("after: ", structprune.cost(slim, images))
    print(benchmark({"dense": model, "slim": slim}, images, runs=20))


if __name__ == "__main__":
    main()
