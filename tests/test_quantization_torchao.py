"""Programs of torchao: what is narrow, that they are read again, and what is refused."""

from __future__ import annotations

import json
import logging
import sys
import zipfile
from importlib.util import find_spec

import pytest
import torch
from support.quantised import Block, batches, convolutions
from torch import nn

import structprune
from structprune.errors import ExportError, LoadError, MissingExtraError

needs_torchao = pytest.mark.skipif(not find_spec("torchao"), reason="the extra torchao is not installed here")


@pytest.fixture
def pruned():
    torch.manual_seed(0)
    return structprune.prune(convolutions(), torch.randn(2, 3, 12, 12), ratio=0.25, round_to=1)


def integers(path):
    """The tensors of eight bits in a file, by torch's own way of reading it."""
    return [tensor for tensor in torch.export.load(path).state_dict.values() if tensor.dtype is torch.int8]


@needs_torchao
@pytest.mark.parametrize("ranges", ["minmax", "squared_error"])
def test_weights_and_activations_of_a_pruned_network(pruned, tmp_path, ranges):
    data = batches(4, 3, 12, 12)
    state = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    found = structprune.quantize(pruned, tmp_path / "q.pt2", data[0], data, backend="torchao", ranges=ranges)
    assert (found.layers, found.left, found.backend) == (3, 0, "torchao")
    assert 1e-3 < found.max_relative_error < 0.1  # eight bits show, and are enough
    assert found.bytes == (tmp_path / "q.pt2").stat().st_size
    assert pruned.training
    assert all(torch.equal(state[name], tensor) for name, tensor in pruned.state_dict().items())
    weights = [each for each in integers(found.path) if each.ndim > 1]
    assert sum(each.numel() for each in weights) == sum(p.numel() for p in pruned.parameters() if p.ndim > 1)
    # Of every channel its own scale, with the batch norm folded in: 127 is reached in each.
    first = next(each for each in weights if each.ndim == 4 and each.shape[1] == 3)
    assert (first.flatten(1).int().abs().amax(1) >= 126).all()
    # The floats that they were are not in the file, nor are inputs, nor paths of this machine.
    left = [tensor for tensor in torch.export.load(found.path).state_dict.values() if tensor.dtype is torch.float32]
    assert sum(tensor.numel() for tensor in left) < 200
    with zipfile.ZipFile(found.path) as archive:
        held = b"".join(map(archive.read, archive.namelist()))
        facts = json.loads(archive.read("q/extra/structprune.json"))
    assert b".py" not in held
    assert facts["inputs"] == ["input"]
    assert len(json.loads(facts["structprune.plans"])) == 1


class Residual(nn.Module):
    """A block that calls one ReLU twice, as those of torchvision do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")  # an operation of its own in front
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


@needs_torchao
def test_a_module_may_be_called_more_than_once(tmp_path):
    torch.manual_seed(0)
    model, data = nn.Sequential(Residual(), Residual()), batches(2, 8, 6, 6)
    found = structprune.quantize(model, tmp_path / "q.pt2", data[0], data, backend="torchao")
    assert (found.layers, found.left) == (4, 0)
    assert 1e-3 < found.max_relative_error < 0.1


@needs_torchao
@pytest.mark.parametrize(
    ("scheme", "off", "narrow"),
    [
        ("int8", (1e-4, 0.1), 1.0),
        ("int8_dynamic", (1e-4, 0.1), 1.0),
        ("int8_weights", (1e-4, 0.02), 1.0),
        ("int4_weights", (0.01, 0.2), 0.5),
    ],
)
def test_matrix_products(tmp_path, scheme, off, narrow):
    torch.manual_seed(0)
    model, data = Block(), batches(2, 7, 64)
    found = structprune.quantize(
        model, tmp_path / "q.pt2", data[0], data, scheme=scheme, backend="torchao", dynamic_dims={"x": {1: "n"}}
    )
    assert (found.layers, found.left, found.scheme) == (3, 0, scheme)
    assert off[0] < found.max_relative_error < off[1]
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    # Scales and zeros, which integers may be too, are one for each row.
    assert sum(w.numel() for w in integers(found.path) if w.ndim > 1 and w.shape[-1] > 1) == narrow * weights
    module = structprune.torch_model(found.path)
    model.eval()
    for size, length in ((1, 5), (3, 9)):
        (x,) = batches(size, length, 64, count=1)
        assert (module(x) - model(x)).abs().max() < 2 * off[1] * model(x).abs().max()
        assert torch.equal(module(x), module(x=x))


@needs_torchao
def test_numbers_of_four_bits_are_unpacked_as_torchao_packed_none():
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    from structprune.quantization.torch_ao import Nibbles

    torch.manual_seed(0)
    layer = nn.Linear(96, 40)
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), lambda *_: True)
    narrow = Nibbles(layer)
    assert narrow.packed.numel() == 96 * 40 / 2
    x = torch.randn(5, 96)
    torch.testing.assert_close(narrow.weight, layer.weight.dequantize(), rtol=0, atol=0)
    torch.testing.assert_close(narrow(x), layer(x))


@needs_torchao
@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic", "int8_weights", "int4_weights"])
def test_a_model_that_is_one_layer(tmp_path, scheme):
    torch.manual_seed(0)
    model, x = nn.Linear(64, 8), torch.randn(4, 64)
    found = structprune.quantize(model, tmp_path / "q.pt2", x, [x], scheme=scheme, backend="torchao")
    assert (found.layers, found.left) == (1, 0)
    assert type(model.weight) is nn.Parameter


@needs_torchao
def test_rows_that_no_group_fits_stay_as_they_are(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 40)), torch.randn(4, 40)
    found = structprune.quantize(model, tmp_path / "q.pt2", x, scheme="int4_weights", backend="torchao")
    assert (found.layers, found.left) == (1, 1)
    # They are unpacked by torch alone.
    with zipfile.ZipFile(found.path) as archive:
        assert json.loads(archive.read("q/extra/structprune.json"))["torchao"] is False
        assert b"torchao." not in archive.read("q/models/model.json")


@needs_torchao
def test_a_decoder_with_tied_weights(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the extra models is not installed here")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=50, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(50, (2, 9)), "use_cache": False}
    found = structprune.quantize(model, tmp_path / "q.pt2", inputs, scheme="int4_weights", backend="torchao")
    assert (found.layers, found.left) == (2 * 7 + 1, 0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    logits = structprune.torch_model(found.path)(inputs["input_ids"][:1])
    expected = model(**inputs).logits[:1]
    assert (logits - expected).abs().max() < 0.3 * expected.abs().max()


@needs_torchao
def test_modes_of_a_file_say_nothing_and_it_is_timed(pruned, tmp_path):
    data = batches(4, 3, 12, 12)
    module = structprune.torch_model(
        structprune.quantize(pruned, tmp_path / "q.pt2", data[0], data, backend="torchao").path
    )
    assert module.train() is module
    times = structprune.benchmark({"float": pruned, "int8": module}, data[0], runs=3, explanations=False)
    assert [each.model for each in times.timings] == ["float", "int8"]
    with pytest.raises(ExportError, match="takes the inputs input; got other"):
        module(other=data[0])


@needs_torchao
def test_nothing_is_said_nor_logged(pruned, tmp_path, caplog, capfd):
    root = logging.getLogger()
    before = list(root.handlers), root.manager.disable
    data = batches(4, 3, 12, 12)
    structprune.torch_model(structprune.quantize(pruned, tmp_path / "q.pt2", data[0], data, backend="torchao").path)
    assert (list(root.handlers), root.manager.disable) == before
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")


@needs_torchao
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int8_weights"}, "no layer of Sequential was quantised .* use scheme='int8'"),
        ({"data": [torch.randn(2, 5, 12, 12)]}, "cannot run on a batch of the data"),
        ({"data": batches(3, 3, 12, 12), "dynamic_batch": False}, "shape.0. to be equal to 2, but got 3"),
        ({"data": batches(2, 3, 12, 12), "tolerance": 1e-6}, "torch.export, more than 1e-06"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, options, message):
    options = dict(options)
    data = options.pop("data", None)
    model = nn.Sequential(*list(convolutions())[:-1])
    with pytest.raises(ExportError, match=message):
        structprune.quantize(model, tmp_path / "q.pt2", torch.randn(2, 3, 12, 12), data, backend="torchao", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "gptq"}, "backend is 'gptq'; give one of 'onnxruntime', 'torchao'"),
        ({"ranges": "entropy"}, "ranges is 'entropy'; give one of 'minmax', 'squared_error'"),
        ({"backend": "onnxruntime", "ranges": "squared_error"}, "give one of 'minmax', 'entropy', 'percentile'"),
        ({"path": "q.onnx"}, "programs of torch are files that end in .pt2"),
    ],
)
def test_options_of_the_other_are_refused(tmp_path, options, message):
    options = {"backend": "torchao", "path": "q.pt2"} | options
    path, x = tmp_path / options.pop("path"), torch.randn(2, 4)
    with pytest.raises(ExportError, match=message):
        structprune.quantize(nn.Linear(4, 2), path, x, [x], **options)


def test_torchao_is_asked_for_by_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchao", None)
    x = torch.randn(2, 4)
    with pytest.raises(MissingExtraError, match=r"pip install 'structprune\[torchao\]'"):
        structprune.quantize(nn.Linear(4, 2), tmp_path / "q.pt2", x, [x], backend="torchao")


def test_what_is_no_file_of_ours_is_no_module(tmp_path):
    (tmp_path / "text.pt2").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "empty.pt2", "w") as archive:
        archive.writestr("a/other", "")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "foreign.pt2")
    messages = {
        "text": "cannot be read",
        "absent": "cannot be read",
        "empty": "holds neither",
        "foreign": "not written by",
    }
    for name, message in messages.items():
        with pytest.raises(LoadError, match=message):
            structprune.torch_model(tmp_path / f"{name}.pt2")
