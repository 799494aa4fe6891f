"""Choose timm's models: of each file the one with the fewest parameters, a second one, and inputs that they take.

Run once for a release of timm: ``python benchmarks/zoo_models/choose_timm.py``. Models are built on ``meta``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from harness.children import OverTime, at_most
from support.torchvision_shim import make_torchvision_importable

from zoo_models.timm_families import CHOSEN

_LARGE = ("giant", "huge", "xlarge", "so400m", "so150m", "_7b", "gigantic", "_xl", "_x1_", "enormous", "large", "_256d")
_SIZES = (64, 96, 128, 224)


def _built(name: str, **options: Any) -> torch.nn.Module:
    import timm

    with torch.device("meta"), at_most(30):
        return timm.create_model(name, pretrained=False, **options).eval()


def _count(name: str) -> int | None:
    try:
        return sum(p.numel() for p in _built(name).parameters())
    except (Exception, OverTime):  # a model that cannot be built so is not chosen
        return None


def _inputs(name: str) -> dict[str, Any] | None:
    """The smallest image that the model takes, resized at construction if need be."""
    import timm

    default = timm.get_pretrained_cfg(name)
    largest = default.input_size[-1] if default else 224
    for size in (*(s for s in _SIZES if s < largest), largest):
        for resized in (False, True):
            try:
                model = _built(name, **({"img_size": size} if resized else {}))
                with torch.no_grad(), at_most(30):
                    model(torch.randn(1, 3, size, size, device="meta"))
                return {"name": name, "shape": [1, 3, size, size], "resized": resized}
            except (Exception, OverTime):  # nor one that does not run at this size, or takes too long
                continue
    return None


def main() -> int:
    make_torchvision_importable()
    import timm

    torch.set_num_threads(1)
    chosen: dict[str, list[dict[str, Any]]] = {}
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        some = [name for name in names if not any(word in name for word in _LARGE)] or names
        some = some[:: max(1, len(some) // 12)]
        counts = sorted((count, name) for name in some if (count := _count(name)))
        if not counts:
            continue
        # The second is as far from the first as the middle of the list.
        picked = [counts[0][1], *([counts[len(counts) // 2][1]] if len(counts) > 1 else [])]
        found = [inputs for name in picked if (inputs := _inputs(name))]
        for model in found:
            model["parameters"] = next(count for count, name in counts if name == model["name"])
        chosen[module] = found
        print(module, [(model["name"], model["shape"][-1]) for model in found], flush=True)
        CHOSEN.write_text(json.dumps(chosen, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
