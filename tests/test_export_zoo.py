"""Models of the zoo, one of every kind, written as ONNX after pruning and run by ONNX Runtime at two batch sizes.

``benchmarks/export_zoo.py`` does the same with all models of ``test_zoo.py``.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from support.zoo import each_of, entry_of, zoo_check

import structprune

# Those whose export takes a few seconds.
MODELS = (
    "torchvision/squeezenet1_1",
    "timm/efficientnet/test_efficientnet",
    "timm/vision_transformer/test_vit4",
    "transformers/bert-mlm",
    "transformers/llama",
    "generation/discriminator-spectral-norm-hook",
    "speech/conformer",
    "yolo/c3k2-c2psa",
)


@each_of(MODELS)
def test_pruned_model_is_exported_with_a_free_batch(key: str, tmp_path: Path) -> None:
    model, inputs = zoo_check.built(entry_of(key))
    plan = structprune.plan(model, inputs, ratio=0.5)
    slim = plan.apply(model)
    result = structprune.export_onnx(slim, tmp_path / "slim.onnx", inputs)
    assert result.max_relative_error < 1e-4
    info = structprune.onnx_info(result.path)
    assert info.digests == (plan.digest,)
    assert (info.before, info.after) == (plan.before, plan.after)
    assert any("batch" in shape for shape in info.inputs.values())
    # Nothing of the original is left in the file: it is hardly larger than the tensors of the pruned model.
    held = {id(tensor): tensor.numel() * tensor.element_size() for tensor in (*slim.parameters(), *slim.buffers())}
    assert result.bytes < 1.2 * sum(held.values()) + 600 * len(onnx.load(result.path).graph.node)
