"""Activations in files: the same results, nothing left behind, and less memory."""

from __future__ import annotations

import resource
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from support.peak_memory import needs_proc, peak_over_weights
from support.transformers_models import MODELS, made
from torch import Tensor, nn

import structprune
from structprune.errors import RecoveryError
from structprune.forwards import activation_files
from structprune.forwards.activation_files import ActivationFiles


class Residual(nn.Module):
    """Convolutions with norms, sums, and activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for first, second in ((0, 1), (2, 3)):
            hidden = self.norms[first](self.convs[first](x)).relu_()
            x = (self.norms[second](self.convs[second](hidden)).add_(x)).relu_()
        return self.head(x.mean((2, 3)))


class Tagger(nn.Module):
    """A recurrent layer between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.rnn, self.head = nn.Linear(3, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(torch.relu(self.into(x)))[0])


def conv_net() -> tuple[nn.Module, list[Tensor]]:
    return Residual().eval(), [torch.randn(12, 3, 6, 6) for _ in range(3)]


def tagger() -> tuple[nn.Module, list[Tensor]]:
    return Tagger().eval(), [torch.randn(8, 7, 3) for _ in range(3)]


def half() -> tuple[nn.Module, list[Tensor]]:
    model, data = conv_net()
    return model.bfloat16(), [x.bfloat16() for x in data]


def language_model() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model, _ = made(MODELS["llama"])
    return model, [{"input_ids": torch.randint(2, 30, (8, 9))} for _ in range(3)]


@pytest.fixture(autouse=True)
def all_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_files, "LEAST", 1)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each file that is made."""
    sizes: list[int] = []
    file_of = ActivationFiles._file_of

    def noted(self: ActivationFiles, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        sizes.append(storage.nbytes())
        return file_of(self, storage)

    monkeypatch.setattr(ActivationFiles, "_file_of", noted)
    return sizes


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("make", [conv_net, tagger, half, language_model])
def test_recovered_weights_are_the_same_to_the_bit(
    make: Callable[[], tuple[nn.Module, list]], rounds: int, tmp_path: Path, written: list[int]
) -> None:
    torch.manual_seed(0)
    model, data = make()
    slim = structprune.prune(model, data[0], ratio=0.5, round_to=1)
    wanted = structprune.recover(slim, model, data, rounds=rounds)
    assert not written
    assert not equal(wanted, slim)
    found = structprune.recover(slim, model, data, rounds=rounds, offload=tmp_path / "new" / "folder")
    assert equal(found, wanted)
    assert len(written) > len(data)
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_statistics_and_scores_are_the_same_to_the_bit(tmp_path: Path, written: list[int]) -> None:
    torch.manual_seed(0)
    model, data = conv_net()
    assert equal(structprune.recalibrate(model, data, offload=tmp_path), structprune.recalibrate(model, data))
    after_norms = len(written)
    assert after_norms > len(data)
    graph = structprune.DependencyGraph(model, data[0])
    scores = [structprune.Reconstruction(offload=where).fit(graph, data)._curves for where in (None, str(tmp_path))]
    assert scores[0].keys() == scores[1].keys()
    for key, curve in scores[0].items():
        assert (curve.order == scores[1][key].order).all()
        assert (curve.price == scores[1][key].price).all()
    assert len(written) > after_norms
    assert not list(tmp_path.iterdir())


def test_views_stay_views_and_weights_stay_where_they_are(tmp_path: Path) -> None:
    weight, x = nn.Parameter(torch.ones(4)), torch.arange(6.0)
    left = {weight.untyped_storage().data_ptr()}
    moved = ActivationFiles(tmp_path).moved([x, {"view": x[2:], "weight": weight}, weight[1:]], left)
    assert torch.equal(moved[0], x)
    moved[1]["view"].fill_(7)
    assert moved[0].tolist() == [0, 1, 7, 7, 7, 7]
    assert x.tolist() == [0, 1, 2, 3, 4, 5]
    assert moved[1]["weight"] is weight
    assert moved[2].data_ptr() == weight[1:].data_ptr()


@pytest.fixture
def short_files() -> Generator[None]:
    """Files of this process may not be longer than 100 bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_folder_is_told_and_left_empty(tmp_path: Path, short_files: None) -> None:
    model, data = conv_net()
    slim = structprune.prune(model, data[0], ratio=0.5, round_to=1)
    with pytest.raises(RecoveryError, match=r"do not fit into .*bytes more. Give offload= a folder with more space"):
        structprune.recover(slim, model, data, offload=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_folder_is_told(tmp_path: Path) -> None:
    model, data = conv_net()
    (tmp_path / "file").write_text("")
    with pytest.raises(RecoveryError, match=r"offload='.*file' can be no folder for activations: File exists"):
        structprune.recalibrate(model, data, offload=tmp_path / "file")
    with pytest.raises(RecoveryError, match="offload is 3"):
        structprune.recalibrate(model, data, offload=3)


class WritesOverItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.mul_(2)))


def test_a_forward_that_cannot_begin_in_the_middle_is_told(tmp_path: Path) -> None:
    data = [torch.randn(8, 3, 5, 5)]
    with pytest.raises(RecoveryError, match=r"writes over its input .* Leave out offload="):
        structprune.recalibrate(WritesOverItsInput().eval(), data, offload=tmp_path)


WIDE = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 512), nn.Linear(512, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

model = nn.Sequential(*(Block() for _ in range(2)))
data = [torch.randn(4096, 32) for _ in range(16)]
slim = structprune.prune(model, data[0][:1], ratio=0.25, axes=("mlp",), verify=False)
structprune.recover(slim, model, [x[:64] for x in data], rounds=0, rows=4096)  # what is loaded once
weights = 16 * 4096 * 512 * 4  # what goes into one layer
"""


@needs_proc
def test_memory_holds_what_one_batch_needs(tmp_path: Path) -> None:
    call = "structprune.recover(slim, model, data, rounds=0, rows=4096{})"
    assert peak_over_weights(WIDE, call.format(""), with_files=False) > 0.75
    assert 0 < peak_over_weights(WIDE, call.format(f", offload={str(tmp_path)!r}"), with_files=False) < 0.3
