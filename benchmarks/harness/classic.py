"""The network of the classical pruning experiments on CIFAR-10, and a short training of it on a CPU.

Three convolutions of 256, 512 and 1,024 channels and linear layers of 2,048, 512 and 10: 15,355,402 parameters.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness import cifar
from harness.training import half_if_fast

IMAGES, EPOCHS, BATCH, RATE = 10_000, 4, 100, 1e-3


class ClassicNet(nn.Module):
    """Convolution, ReLU, 2x2 max pooling and batch norm, three times; then three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 256, 3), nn.BatchNorm2d(256)
        self.conv2, self.bn2 = nn.Conv2d(256, 512, 3), nn.BatchNorm2d(512)
        self.conv3, self.bn3 = nn.Conv2d(512, 1024, 3), nn.BatchNorm2d(1024)
        self.fc1, self.fc2, self.fc3 = nn.Linear(4096, 2048), nn.Linear(2048, 512), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(F.max_pool2d(F.relu(self.conv1(x)), 2))
        x = self.bn2(F.max_pool2d(F.relu(self.conv2(x)), 2))
        x = self.bn3(F.max_pool2d(F.relu(self.conv3(x)), 2))
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


def train(path: Path, images: int = IMAGES, epochs: int = EPOCHS) -> None:
    """Train it on the first of the training images, mirrored at random; the weights go to `path`."""
    torch.manual_seed(0)
    model = ClassicNet().train()
    x, y = cifar.train_images(images)
    steps = epochs * -(-images // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    done = 0
    for _ in range(epochs):
        for batch in torch.randperm(images).split(BATCH):
            mirrored = torch.rand(len(batch), 1, 1, 1) < 0.5
            inputs = torch.where(mirrored, x[batch].flip(3), x[batch])
            with half_if_fast():
                loss = F.cross_entropy(model(inputs), y[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done % 50 == 0:
                print(f"step {done} of {steps}: loss {float(loss.detach()):.3f}", flush=True)
        save_file(model.state_dict(), path)


def load(path: Path) -> ClassicNet:
    """The trained network, in eval mode."""
    model = ClassicNet()
    model.load_state_dict(load_file(path))
    return model.eval()
