"""Forty models of the zoo, one or more of every kind: pruned by one plain call at ratio 0.5, right, and small enough.

Each is saved and loaded into a model of other weights too, and comes back bit for bit.

The code is that of ``benchmarks/zoo.py``, which runs all of them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from support.zoo import each_of, entry_of, zoo_check, zoo_report

MODELS = (
    # Convolutions: plain, residual, dense, grouped, shuffled, squeezed, in branches; over time; maps of pixels.
    "torchvision/squeezenet1_1",
    "torchvision/resnet18",
    "torchvision/densenet121",
    "torchvision/regnet_y_400mf",
    "torchvision/shufflenet_v2_x1_0",
    "torchvision/mobilenet_v3_small",
    "torchvision/googlenet",
    "torchvision/mc3_18",
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/fasterrcnn_mobilenet_v3_large_fpn.backbone",
    "torchvision/raft_small",
    "timm/dla/dla46x_c",
    "timm/fasternet/fasternet_t0",
    "timm/efficientnet/test_efficientnet",
    "timm/cspnext/cspnext_tiny",
    # Attention over images.
    "torchvision/mvit_v1_b",
    "timm/vision_transformer/test_vit4",
    "timm/cait/cait_xxs24_224",
    "timm/eva/eva02_tiny_patch14_336",
    "timm/gcvit/gcvit_xxtiny",
    "timm/pvt_v2/pvt_v2_b0",
    "transformers/swin",
    "transformers/segformer",
    "transformers/detr",
    # Language, alone and with images or sound.
    "transformers/bert-mlm",
    "transformers/deberta-v2",
    "transformers/gpt2",
    "transformers/llama",
    "transformers/gemma3",
    "transformers/t5",
    "transformers/mamba2",
    "transformers/whisper",
    "transformers/wav2vec2",
    "transformers/sam",
    "transformers/llava",
    # Pictures and sound made, speech, detection.
    "generation/unet-with-attention",
    "generation/vocoder-weight-norm-parametrized",
    "generation/discriminator-spectral-norm-hook",
    "speech/conformer",
    "yolo/c3k2-c2psa",
)


@each_of(MODELS)
def test_model_is_pruned_exactly(key: str) -> None:
    facts: dict[str, Any] = {}
    zoo_check.checked(entry_of(key), (0.5,))(facts.update)
    assert zoo_report.outcome(facts) == "right", facts
    assert "saved and loaded_s" in facts["0.5"], "it was saved and loaded, which raises where a bit differs"
    assert facts["0.5"]["kept"] <= zoo_report.bound(facts)
    reasons = [pinned["reason"] + pinned["example"] for pinned in facts["model"]["pinned"]]
    assert not any(str(Path.home()) in reason or sys.prefix in reason for reason in reasons)
