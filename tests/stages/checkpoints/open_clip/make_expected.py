"""Writes expected.json: embeddings by open_clip_torch itself, of weights and inputs that the tests make alike.

    python -m tests.stages.checkpoints.open_clip.make_expected OPEN_CLIP

OPEN_CLIP is a folder with open_clip_torch 3.3.0 (`pip install --target OPEN_CLIP --no-deps open_clip_torch==3.3.0`).
The models here use nothing of torchvision, in whose place is an empty module.
"""

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401 - looks for torchvision, so it comes before the empty one
from torch import nn

from tests.imagen_core.conversion.minimagen.numbers import numbers, weights

TEXT = {"context_length": 9, "vocab_size": 40, "width": 24, "heads": 3, "layers": 2}
VISION = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2, "mlp_ratio": 2.5}
CASES: dict[str, dict[str, Any]] = {
    "ViT": {"embed_dim": 12, "text_cfg": TEXT, "vision_cfg": VISION},
    "ViT, quick_gelu": {"embed_dim": 12, "quick_gelu": True, "text_cfg": TEXT, "vision_cfg": VISION},
    "custom text": {"embed_dim": 12, "custom_text": True, "text_cfg": TEXT, "vision_cfg": VISION},
    "ResNet": {
        "embed_dim": 12,
        "text_cfg": TEXT,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None},
    },
}
IDS = [[37, 3, 8, 39, 0, 0, 0, 0, 0], [37, 5, 6, 7, 8, 9, 10, 11, 39]]
"""Token ids of two captions as open_clip pads them: the end has the highest id."""


def main(place: str) -> None:
    package = types.ModuleType("open_clip")  # without its __init__, which imports its transforms
    package.__path__ = [f"{place}/open_clip"]
    stub = types.ModuleType("torchvision.ops.misc")
    stub.FrozenBatchNorm2d = nn.BatchNorm2d  # type: ignore[attr-defined]
    sys.modules |= {"open_clip": package, "torchvision.ops.misc": stub}
    sys.modules |= {name: types.ModuleType(name) for name in ("torchvision", "torchvision.ops")}
    open_clip = importlib.import_module("open_clip.model")
    expected = {}
    for name, config in CASES.items():
        settings = {key: value for key, value in config.items() if key != "custom_text"}
        kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
        model = kind(**settings).eval()
        shapes = {key: list(values.shape) for key, values in model.state_dict().items() if "num_batches" not in key}
        state = weights(shapes)
        state |= {key: values.abs() + 0.5 for key, values in state.items() if "running_var" in key}
        model.load_state_dict(state, strict=False)
        side = config["vision_cfg"]["image_size"]
        with torch.no_grad():
            text = model.encode_text(torch.tensor(IDS))
            images = model.encode_image(numbers("pixels", (2, 3, side, side)))
        expected[name] = {"shapes": shapes, "text": text.tolist(), "images": images.tolist()}
    path = Path(__file__).with_name("expected.json")
    path.write_text(json.dumps(expected), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
