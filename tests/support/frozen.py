"""A small network with everything that a plan can hold, and saves of it that later versions must go on reading.

``python -m support.frozen FOLDER``, run in ``tests``, writes a save of the schema of today with what is expected of it.
A folder in ``tests/data`` is written once for each schema, and never again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import structprune
from structprune.planning.plan import plans_of


class Attention(nn.Module):
    """Two heads of four; their size scales the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 2, 8
        self.qkv, self.out = nn.Linear(12, 48), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, self.heads * self.head_dim))


class Shuffled(nn.Module):
    """Halves that are shuffled, so that survivors stand in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 6, 1)
        self.units = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(x))
        for unit in self.units:
            kept, changed = x.chunk(2, 1)
            x = torch.cat((kept, torch.relu(unit(changed))), 1)
            b, c, h, w = x.shape
            x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.down(x)


class Frozen(nn.Module):
    """Convolutions, a literal, attention, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.shuffled = Shuffled()
        self.inner, self.attention = nn.Linear(96, 12), Attention()
        self.embed, self.head = nn.Embedding(7, 12), nn.Linear(12, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        x = self.inner(torch.relu(self.shuffled(image)).reshape(-1, 96))
        x = x[:, None] + self.embed(tokens)
        return self.head(x + self.attention(x))


INPUTS = torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4), torch.arange(6).reshape(2, 3)


def build() -> nn.Module:
    """The network before it is pruned; its weights do not matter."""
    return Frozen().eval()


def write(folder: Path) -> None:
    """Save the network after two rounds, and what must come out of it."""
    torch.manual_seed(0)
    model = build()
    for ratio in (0.25, 0.25):
        structprune.prune(model, INPUTS, ratio=ratio, round_to=1, inplace=True)
    structprune.save(model, folder)
    with torch.no_grad():
        output = model(*INPUTS)
    expected = {
        "digests": [plan.digest for plan in plans_of(model)],
        "shapes": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        "output": output.tolist(),
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
