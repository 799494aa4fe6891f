"""The documentation: every Python block runs, every page is reachable, and what it says is in the code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from support.pages import Run
from torch import nn

from structprune.channels.rules import RULES
from structprune.tracing.opaque import OPAQUE

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))

@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A page runs in a folder of its own, and what it registers is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tables = [(table, dict(table)) for table in (RULES, OPAQUE)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "docs").as_posix())
def test_page(page: Path) -> None:
    Run(page).run()


def small_resnet50() -> nn.Module:
    """One block in each stage: the layers that the README speaks of are there, with the widths that they have."""
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)


def test_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    """The README runs on a small network and small images; its reader has data and an optimizer of his own."""
    page = ROOT / "README.md"
    model = small_resnet50()
    waiting = [model]
    monkeypatch.setattr(torchvision.models, "resnet50", lambda: waiting.pop() if waiting else small_resnet50())
    monkeypatch.setattr("structprune.latency.measure.SECONDS", 3.0)
    images = torch.randn(12, 3, 32, 32).split(4)
    given = {
        "images": images,
        "loader": [(batch, torch.randint(10, (4,))) for batch in images],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    }
    text = page.read_text()
    assert "224, 224" in text
    Run(page, given, text.replace("224, 224", "32, 32")).run()
