"""Published UNets of the Hybrid family."""

from imagen_core.models.hybrid.unet import HybridUNetConfig
from imagen_core.models.presets.base import Preset


def _base(width: int, cond_width: int, text_dim: int = 1024, **more: object) -> HybridUNetConfig:
    """Base models of 64 px."""
    return HybridUNetConfig.model_validate(
        {
            "image_size_px": 64,
            "dim": width,
            "dim_mults": (1, 2, 3, 4),
            "num_res_blocks": (3, 3, 3, 3),
            "attention_levels": (False, True, True, True),
            "cross_attention_levels": (False, True, True, True),
            "cond_dim": cond_width,
            "text_dim": text_dim,
            **more,
        }
    )


def _super_resolution(size_px: int, text_dim: int | None, *, attends: bool, **more: object) -> HybridUNetConfig:
    """Super-resolution models; with `attends` the deepest level has a transformer block."""
    return HybridUNetConfig.model_validate(
        {
            "image_size_px": size_px,
            "dim": 128,
            "dim_mults": (1, 2, 4, 8),
            "num_res_blocks": (2, 4, 8, 8),
            "attention_levels": (False, False, False, attends),
            "cross_attention_levels": (False, False, False, True),
            "text_dim": text_dim,
            "unread_caption_parameters": text_dim is None,
            "memory_efficient": True,
            "initial_res_block": True,
            "low_res": True,
            "low_res_noise": True,
            **more,
        }
    )


def _decoder(
    dim: int, dim_mults: tuple[int, ...], cond_dim: int, image_embed_dim: int, text_dim: int | None, **more: object
) -> HybridUNetConfig:
    """DALL-E 2's decoder: attention to captions in the middle only, and to image embeddings below the first level."""
    levels = len(dim_mults)
    return HybridUNetConfig.model_validate(
        {
            "dim": dim,
            "dim_mults": dim_mults,
            "num_res_blocks": (2,) * levels,
            "attention_levels": (False,) * levels,
            "cross_attention_levels": (False, *(True,) * (levels - 1)),
            "conditions_in": "other_blocks",
            "cond_dim": cond_dim,
            "text_dim": text_dim,
            "image_embed_dim": image_embed_dim,
            "text_in_middle_only": True,
            "caption_vector": False,
            "unread_caption_parameters": text_dim is None,
            "perceiver": False,
            "num_heads": 16,
            "head_dim": 32,
            "cross_num_heads": 8,
            "cross_head_dim": 64,
            "ff_mult": 0,
            "attend_to_conditions": False,
            "deepest_widen": "conv",
            "res_block": "conv_first",
            "global_context": False,
            "final_global_context": False,
            "num_fourier_frequencies": None,
            "scale_skips": False,
            "init_residual": True,
            "out_kernel_size": 1,
            **more,
        }
    )


_LUCIDRAINS = {"norm": "rms", "qk_norm": True}
MINIMAGEN = {
    "perceiver": False,
    "attend_to_conditions": False,
    "middle_attention": False,
    "downsample": "conv",
    "upsample": "repeat_conv",
    "global_context": False,
    "final_global_context": False,
    "num_fourier_frequencies": None,
    "sinusoids": "closed",
    "low_res_at_end": False,
}
"""Settings that MinImagen's UNets have in common."""
_PADDLE, _PYTORCH, _MINI, _DALLE2 = "PaddleFleetX Imagen", "imagen-pytorch", "MinImagen", "DALLE2-pytorch"
_TINY = {
    "dim": 8,
    "dim_mults": (1, 2),
    "attention_levels": (False, False),
    "cross_attention_levels": (False, False),
    "cond_dim": None,
}

HYBRID_PRESETS: dict[str, Preset] = {
    "paddle_397m": Preset(
        _base(256, 256), 414_393_508, f"{_PADDLE} Unet64_397M (397M counts in 2^20, at first release)"
    ),
    "paddle_2b": Preset(_base(512, 512), 1_625_964_196, f"{_PADDLE} BaseUnet64 (2B is the paper's name)"),
    "paddle_deberta": Preset(_base(360, 512, 1536), 816_288_260, f"{_PADDLE} text2im_64_debertav2"),
    "paddle_sr256": Preset(
        _super_resolution(256, None, attends=True), 730_837_266, f"{_PADDLE} SRUnet256 as shipped, without captions"
    ),
    "paddle_sr256_text": Preset(_super_resolution(256, 1024, attends=True), 732_150_418, f"{_PADDLE} SRUnet256"),
    "paddle_sr1024": Preset(
        _super_resolution(1024, None, attends=False), 720_045_330, f"{_PADDLE} SRUnet1024 as shipped, without captions"
    ),
    "paddle_sr1024_text": Preset(_super_resolution(1024, 1024, attends=False), 721_358_482, f"{_PADDLE} SRUnet1024"),
    "imagen_pytorch_base": Preset(_base(512, 512, **_LUCIDRAINS), 1_625_873_188, f"{_PYTORCH} BaseUnet64"),
    "imagen_pytorch_sr256": Preset(
        _super_resolution(256, 1024, attends=True, **_LUCIDRAINS), 732_069_522, f"{_PYTORCH} SRUnet256"
    ),
    "imagen_pytorch_sr1024": Preset(
        _super_resolution(1024, 1024, attends=False, **_LUCIDRAINS), 721_277_330, f"{_PYTORCH} SRUnet1024"
    ),
    "minimagen_base": Preset(_base(512, 512, 768, **MINIMAGEN), 1_618_466_051, f"{_MINI} Base, 768-wide T5"),
    "minimagen_super": Preset(
        _super_resolution(256, 768, attends=True, **MINIMAGEN, initial_res_block=False, cond_dim=128),
        715_760_003,
        f"{_MINI} Super, 768-wide T5",
    ),
    "minimagen_base_test": Preset(
        _base(8, 8, 768, **MINIMAGEN, **_TINY, num_res_blocks=(1, 1)), 106_163, f"{_MINI} BaseTest"
    ),
    "minimagen_super_test": Preset(
        _super_resolution(
            128, 768, attends=False, **MINIMAGEN, **_TINY, num_res_blocks=(1, 2), initial_res_block=False
        ),
        158_147,
        f"{_MINI} SuperTest",
    ),
    "dalle2_decoder": Preset(
        _decoder(128, (1, 2, 4, 8), 64, 768, None, image_size_px=64),
        186_292_291,
        f"{_DALLE2} example decoder, 64 px, CLIP ViT-L/14 embeddings",
    ),
    "dalle2_decoder_text": Preset(
        _decoder(128, (1, 2, 4, 8), 128, 512, 512, image_size_px=64),
        187_489_347,
        f"{_DALLE2} README's first decoder UNet, with text encodings",
    ),
    "dalle2_decoder_sr": Preset(
        _decoder(16, (1, 2, 4, 8, 16), 128, 512, None, image_size_px=256, low_res=True),
        16_496_252,
        f"{_DALLE2} README's second decoder UNet",
    ),
}
"""Hybrid UNets by name. Text is 1024 wide (T5 11B) unless the name or source says otherwise."""
