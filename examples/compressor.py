"""Compress a network for handwritten digits until its accuracy has fallen by two points: the interface of Condensa.

The lines between the two rules are the listing of Joseph et al., A Programmable Approach to Neural Network Compression,
2020, nearly word for word. Takes less than a minute: ``python examples/compressor.py``.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from structprune import search

NUM_EPOCHS = 15
STEPS = 30
EPS = 0.02
TRIALS = 6


def loaders() -> tuple[DataLoader, DataLoader, DataLoader]:
    """Images (n, 1, 8, 8) in [0, 1] and labels, to train on, to choose by and to test on."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    rest, test = train_test_split(range(len(labels)), test_size=0.25, stratify=digits.target, random_state=0)
    train, val = train_test_split(rest, test_size=0.25, stratify=labels[rest], random_state=0)
    parts = [TensorDataset(images[part], labels[part]) for part in (train, val, test)]
    return DataLoader(parts[0], 64, shuffle=True), DataLoader(parts[1], 512), DataLoader(parts[2], 512)


def network() -> nn.Module:
    """Three convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip


def train(model: nn.Module, num_epochs: int, trainloader: DataLoader, criterion: nn.Module) -> None:
    """Adam, with a rate that falls along half a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs)
    for _ in range(num_epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss: Tensor = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
        schedule.step()
    model.eval()


def main() -> None:
    """Train, compress and show what came of it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    trainloader, valloader, testloader = loaders()
    model = network()
    # ------------------------------------------------------------------------------------------------------------------
    # Construct pre-trained model
    criterion = torch.nn.CrossEntropyLoss()
    train(model, NUM_EPOCHS, trainloader, criterion)

    # Instantiate compression scheme
    prune = search.FilterPrune()
    # Define objective function
    tput = "throughput"
    # Specify optimization operator
    obj = search.Maximize(tput)
    # Instantiate L-C optimizer
    lc = search.LC(steps=STEPS, lr=0.01)
    # Build model compressor instance
    compressor = search.Compressor(
        model=model,  # Trained model
        objective=obj,  # Objective
        eps=EPS,  # Accuracy threshold
        optimizer=lc,  # Accuracy recovery
        scheme=prune,  # Compression scheme
        trainloader=trainloader,  # Train dataloader
        testloader=testloader,  # Test dataloader
        valloader=valloader,  # Validation dataloader
        criterion=criterion,  # Loss criterion
        trials=TRIALS,
    )
    # Obtain compressed model
    wc = compressor.run()
    # ------------------------------------------------------------------------------------------------------------------
    found = compressor.statistics
    for trial in found["trials"]:
        score = "" if trial["score"] is None else f"{trial['score']:.1f}% on the validation data, "
        (density,) = trial["densities"]
        print(f"density {density:.2f}: {score}{trial['value']:,.0f} images/s, {trial['outcome']}")
    widths = " ".join(str(layer.out_channels) for layer in wc if isinstance(layer, nn.Conv2d))
    weights, test, speed = found["weights"], found["test"], found["objective"]
    print(f"density {found['densities'][0]:.2f}: convolutions of {widths} channels in place of 32 64 64")
    print(f"parameters: {weights['dense']['entries']:,} -> {weights['compressed']['entries']:,}")
    print(f"throughput: {speed['dense']:,.0f} -> {speed['compressed']:,.0f} images/s")
    print(f"test accuracy: {test['dense']:.1f}% -> {test['compressed']:.1f}%")


if __name__ == "__main__":
    main()
