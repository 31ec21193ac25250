"""Published networks for images, each with its exact number of parameters.

The numbers are counts of the systems' own code; where a published label differs from the model that the shipped
configuration builds, `source` says so.
"""

from imagen_core.models.presets.base import Preset
from imagen_core.models.presets.deepfloyd import DEEPFLOYD_PRESETS
from imagen_core.models.presets.hybrid import HYBRID_PRESETS
from imagen_core.models.presets.priors import PRIOR_PRESETS
from imagen_core.models.presets.transformers import TRANSFORMER_PRESETS
from imagen_core.models.unet.efficient import EfficientUNetConfig
from imagen_core.models.unet.regular import RegularUNetConfig


def _base(embed_dim: int, cond_dim: int, text_dim: int = 1024) -> RegularUNetConfig:
    """NeMo's base models."""
    return RegularUNetConfig(
        image_size_px=64,
        embed_dim=embed_dim,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_resolutions=(8, 16, 32),
        cond_dim=cond_dim,
        text_dim=text_dim,
    )


def _regular_sr(*, noise: bool, attention_type: str = "fused", text_dim: int = 1024) -> RegularUNetConfig:
    """NeMo's sr256-400m family."""
    return RegularUNetConfig.model_validate(
        {
            "image_size_px": 256,
            "embed_dim": 128,
            "channel_mult": (1, 2, 4, 6, 6),
            "num_res_blocks": (2, 2, 3, 4, 3),
            "attention_resolutions": (32, 16),
            "attention_type": attention_type,
            "cond_dim": 512,
            "text_dim": text_dim,
            "low_res": True,
            "low_res_noise": noise,
        }
    )


def _efficient_sr(
    size_px: int,
    *,
    noise: bool,
    attention_type: str,
    text_dim: int = 1024,
    small: bool = False,
    up_narrow: str = "first",
) -> EfficientUNetConfig:
    """NeMo's 600M super-resolution models; with `small` the 400M ones of the launcher's first release."""
    return EfficientUNetConfig.model_validate(
        {
            "image_size_px": size_px,
            "embed_dim": 128,
            "channel_mult": (1, 1, 2, 4, 8) if small else (1, 2, 4, 8, 8),
            "num_res_blocks": (1, 2, 4, 8, 8) if small else (2, 4, 8, 8, 8),
            "attention_levels": (False, False, False, not small, True),
            "attention_type": attention_type,
            "text_dim": text_dim,
            "low_res_noise": noise,
            "up_narrow": up_narrow,
        }
    )


def _adm(
    size_px: int, channels: int, mult: tuple[int, ...], blocks: int, attention: tuple[int, ...], **more: object
) -> RegularUNetConfig:
    """Guided diffusion's class-conditional ImageNet models."""
    return RegularUNetConfig.model_validate(
        {
            "image_size_px": size_px,
            "embed_dim": channels,
            "channel_mult": mult,
            "num_res_blocks": blocks,
            "attention_resolutions": attention,
            "attention_type": "self",
            "text_dim": None,
            "out_channels": 6,
            "num_classes": 1000,
            "resblock_updown": True,
            **more,
        }
    )


_NEMO, _T5 = "NeMo Imagen", "with T5-XXL's 4096-wide text"
_PLAIN = "without noise augmentation"
_IMAGENET = (1, 1, 2, 2, 4, 4)

PRESETS: dict[str, Preset] = {
    "500m_res_64": Preset(_base(256, 512), 524_897_540, f"{_NEMO} base64-500m"),
    "500m_res_64_t5xxl": Preset(_base(256, 512, 4096), 528_052_484, f"{_NEMO} base64-500m, {_T5}"),
    "2b_res_64": Preset(_base(512, 2048), 2_171_162_116, f"{_NEMO} base64-2b (published as 2100M)"),
    "2b_res_64_cond1024": Preset(_base(512, 1024), 2_096_664_068, f"{_NEMO} base64-2b with cond_dim 1024"),
    "2b_res_64_cond512": Preset(_base(512, 512), 2_059_415_044, f"{_NEMO} base64-2b as first released, cond_dim 512"),
    "2b_res_64_t5xxl": Preset(_base(512, 2048, 4096), 2_183_754_244, f"{_NEMO} base64-2b, {_T5}"),
    "400m_res_256": Preset(
        _regular_sr(noise=True), 408_350_468, f"{_NEMO} sr256-400m (published as 429M; see sr256_400m_eff)"
    ),
    "400m_res_256_plain": Preset(_regular_sr(noise=False), 408_021_764, f"{_NEMO} sr256-400m-edm, {_PLAIN}"),
    "400m_res_256_t5xxl": Preset(_regular_sr(noise=True, text_dim=4096), 411_505_412, f"{_NEMO} sr256-400m, {_T5}"),
    "450m_res_256": Preset(
        _regular_sr(noise=False, attention_type="stacked"), 568_675_844, f"{_NEMO} sr256-450m-edm, stacked attention"
    ),
    "600m_res_256": Preset(_efficient_sr(256, noise=True, attention_type="fused"), 646_023_428, f"{_NEMO} sr256-600m"),
    "600m_res_256_plain": Preset(
        _efficient_sr(256, noise=False, attention_type="fused"), 645_694_724, f"{_NEMO} sr256-600m, {_PLAIN}"
    ),
    "600m_res_256_stacked": Preset(
        _efficient_sr(256, noise=True, attention_type="stacked"), 700_610_308, f"{_NEMO} sr256-600m-edm-noise"
    ),
    "600m_res_256_stacked_plain": Preset(
        _efficient_sr(256, noise=False, attention_type="stacked"), 700_281_604, f"{_NEMO} sr256-600m-edm"
    ),
    "600m_res_256_t5xxl": Preset(
        _efficient_sr(256, noise=True, attention_type="fused", text_dim=4096),
        701_119_748,
        f"{_NEMO} sr256-600m, {_T5}",
    ),
    "600m_res_1024": Preset(
        _efficient_sr(1024, noise=True, attention_type="cross"),
        639_193_348,
        f"{_NEMO} sr1024-600m (published as 427M)",
    ),
    "600m_res_1024_plain": Preset(
        _efficient_sr(1024, noise=False, attention_type="cross"), 638_864_644, f"{_NEMO} sr1024-600m, {_PLAIN}"
    ),
    "600m_res_1024_t5xxl": Preset(
        _efficient_sr(1024, noise=True, attention_type="cross", text_dim=4096),
        694_289_668,
        f"{_NEMO} sr1024-600m, {_T5}",
    ),
    "sr256_400m_eff": Preset(
        _efficient_sr(256, noise=False, attention_type="fused", small=True, up_narrow="last"),
        429_913_476,
        f"{_NEMO}'s published 429M: the launcher's first sr256, narrowing last",
    ),
    "sr256_400m_eff_first": Preset(
        _efficient_sr(256, noise=False, attention_type="fused", small=True),
        290_417_412,
        f"{_NEMO} launcher's first sr256, narrowing first",
    ),
    "sr1024_400m": Preset(
        _efficient_sr(1024, noise=False, attention_type="cross", small=True, up_narrow="last"),
        427_285_892,
        f"{_NEMO}'s published 427M: the launcher's first sr1024, narrowing last",
    ),
    "sr1024_400m_first": Preset(
        _efficient_sr(1024, noise=False, attention_type="cross", small=True),
        287_789_828,
        f"{_NEMO} launcher's first sr1024, narrowing first",
    ),
    "adm_64": Preset(_adm(64, 192, (1, 2, 3, 4), 3, (32, 16, 8)), 295_904_454, "guided-diffusion ADM, ImageNet 64"),
    "adm_256": Preset(_adm(256, 256, _IMAGENET, 2, (32, 16, 8)), 553_838_086, "guided-diffusion ADM, ImageNet 256"),
    "adm_256_upsampler": Preset(
        _adm(256, 192, _IMAGENET, 2, (32, 16, 8), low_res=True), 311_795_910, "guided-diffusion ADM-U, 64 -> 256"
    ),
    "nostalgebraist_64": Preset(
        _adm(64, 256, (1, 2, 2, 4, 4), 2, (16, 8, 4), num_classes=None),
        538_707_206,
        "nostalgebraist improved-diffusion, 64 px, the image core without its text modules",
    ),
    **DEEPFLOYD_PRESETS,
    **HYBRID_PRESETS,
    **TRANSFORMER_PRESETS,
}
"""Networks of all families by name. Text is 1024 wide (T5 11B) unless the name says otherwise."""


def list_presets() -> list[dict[str, object]]:
    """One row per preset, for listings: kind, name, number of parameters, family and summary. No model is built."""
    return [
        {
            "kind": "unet",
            "name": name,
            "parameters": preset.parameters,
            "family": preset.config.family,
            "summary": preset.source,
        }
        for name, preset in PRESETS.items()
    ] + [
        {"kind": "prior", "name": name, "parameters": preset.parameters, "family": "prior", "summary": preset.source}
        for name, preset in PRIOR_PRESETS.items()
    ]
