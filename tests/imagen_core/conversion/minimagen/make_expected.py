"""Writes expected.json: what MinImagen's UNets give for weights and inputs made of their names.

    python -m tests.imagen_core.conversion.minimagen.make_expected

Needs MinImagen (0.0.6) installed; its text encoder is not used.
"""

import inspect
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch

from tests.imagen_core.conversion.minimagen.numbers import inputs, sampled, weights

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "BaseTest": ("BaseTest", {"text_embed_dim": 512}),
    "SuperTest": ("SuperTest", {"text_embed_dim": 512, "lowres_cond": True}),
    "attention": (
        "BaseTest",
        {
            "text_embed_dim": 24,
            "layer_attns": (False, True),
            "layer_cross_attns": (True, False),
            "attn_heads": 4,
            "cond_dim": 16,
            "num_resnet_blocks": (1, 2),
        },
    ),
    "memory-efficient attention": (
        "SuperTest",
        {"text_embed_dim": 24, "lowres_cond": True, "layer_attns": (False, True), "layer_cross_attns": True},
    ),
    "attention in the middle": ("BaseTest", {"text_embed_dim": 24, "attend_at_middle": True, "attn_heads": 2}),
}


def main() -> None:
    for name in ("minimagen.t5", "torchvision", "torchvision.transforms"):  # of the text encoder, and of images
        sys.modules[name] = types.ModuleType(name)
    sys.modules["minimagen.t5"].get_encoded_dim = {"t5_small": 512}.get  # type: ignore[attr-defined]
    from minimagen import Unet as module  # type: ignore[import-not-found]

    signature = inspect.signature(module.Unet).parameters.items()
    defaults = {name: p.default for name, p in signature if p.default is not inspect.Parameter.empty}
    cases = {}
    for case, (kind, changes) in CASES.items():
        settings = {**defaults, **getattr(module, kind).defaults, **changes}
        net = module.Unet(**settings).eval()
        shapes = {name: list(values.shape) for name, values in net.state_dict().items()}
        net.load_state_dict(weights(shapes))
        given = inputs(settings["text_embed_dim"])
        low_res = {}
        if settings["lowres_cond"]:
            low_res = {"lowres_cond_img": given["low_res"], "lowres_noise_times": given["low_res_time"]}
        with torch.no_grad():
            outputs = {
                what: net(
                    given["x"],
                    given["time"],
                    text_embeds=given["text"],
                    text_mask=given["mask"],
                    cond_drop_prob=dropped,
                    **low_res,
                )
                for what, dropped in (("with_caption", 0.0), ("without_caption", 1.0))
            }
        rounded = {what: [round(v, 5) for v in sampled(values).tolist()] for what, values in outputs.items()}
        cases[case] = {"settings": settings, "shapes": shapes, **rounded}
    path = Path(__file__).with_name("expected.json")
    path.write_text(json.dumps(cases, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
