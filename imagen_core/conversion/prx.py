"""PRX's transformer as a patch transformer, and back: settings and weights as in diffusers' PRXTransformer2DModel.

diffusers 0.42 has one class for PRX's latent models and for its pixel model; a latent one becomes a transformer over
the latents of its autoencoder, which is not part of it. Both directions are exact: what has no counterpart is refused.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from imagen_core.conversion.weights import match_parameters
from imagen_core.models.transformer.model import TransformerConfig

CLASS = "PRXTransformer2DModel"
PIPELINE = "PRXPixelPipeline"
"""The pipeline of the pixel model; PRXPipeline's images are those of an autoencoder."""
_DEFAULTS: dict[str, Any] = {
    "in_channels": 16,
    "patch_size": 2,
    "context_in_dim": 2304,
    "hidden_size": 1792,
    "mlp_ratio": 3.5,
    "num_heads": 28,
    "depth": 16,
    "axes_dim": None,
    "theta": 10_000,
    "time_factor": 1000.0,
    "time_max_period": 10_000,
    "bottleneck_size": None,
    "resolution_embeds": False,
}
_FIXED: dict[str, Any] = {
    "bias": False,
    "norm": "layer",
    "qk_norm": True,
    "mlp_activation": "geglu_tanh",
    "attention_type": "fused",
    "text_norm": False,
    "time": "adaptive",
    "time_sinusoids": 256,
}
"""What every PRX transformer is."""
_ABSENT: dict[str, Any] = {
    "text_embed_dim": None,
    "image_embed_dim": None,
    "num_classes": None,
    "num_text_layers": None,
    "low_res": False,
    "self_conditioning": False,
    "condition_channels": 0,
    "fixed_positions": False,
    "position_scaling": "none",
}
"""What no PRX transformer has."""
_PLAIN = {
    "txt_in": "inputs.text",
    "time_in.in_layer": "inputs.time.hidden",
    "time_in.out_layer": "inputs.time.out",
    "resolution_embedder.mlp.in_layer": "inputs.size.hidden",
    "resolution_embedder.mlp.out_layer": "inputs.size.out",
    "img_in": "patch_in",
    "img_in.0": "patch_in.0",
    "img_in.1": "patch_in.1",
    "final_layer.linear": "patch_out",
    "final_layer.adaLN_modulation.1": "modulation_out",
}
_IN_BLOCK = {
    "attention.txt_kv_proj": "attention.context_to_kv",
    "attention.norm_q": "attention.norm_q",
    "attention.norm_k": "attention.norm_k",
    "attention.norm_added_k": "attention.norm_context_k",
    "attention.to_out.0": "attention.to_out",
    "down_proj": "contract",
    "modulation.lin": "modulation",
}
_BLOCK = re.compile(r"(blocks\.\d+)\.(.+)\.(weight|bias)")
_QKV, _GATE, _UP = "attention.img_qkv_proj", "gate_proj", "up_proj"


def transformer_config(settings: Mapping[str, Any], image_size_px: int | None = None) -> TransformerConfig:
    """The patch transformer of a config.json.

    Args:
        image_size_px: side of the images it was trained on, which it does not name; None: 64 patches.
    Raises:
        ValueError: a setting is unknown or has no counterpart here.
    """
    known = {name: value for name, value in settings.items() if not name.startswith("_")}
    if unknown := sorted(known.keys() - _DEFAULTS.keys()):
        raise ValueError(f"{unknown[0]} is no setting of a {CLASS} that is known here")
    values = _DEFAULTS | known
    head_dim, rest = divmod(values["hidden_size"], values["num_heads"])
    axes = [32, 32] if values["axes_dim"] is None else list(values["axes_dim"])
    if rest or axes != [head_dim // 2] * 2:
        raise ValueError(
            f"axes_dim is {axes} for hidden_size {values['hidden_size']} in {values['num_heads']} heads; only two "
            "equal halves of a head have a counterpart"
        )
    if values["time_max_period"] != 10_000:
        raise ValueError(f"time_max_period is {values['time_max_period']}, but only 10000 has a counterpart")
    channels = values["in_channels"]
    return TransformerConfig.model_validate(
        {
            **_FIXED,
            "image_size_px": image_size_px or 64 * values["patch_size"],
            "patch_px": values["patch_size"],
            "in_channels": channels,
            "out_channels": channels,
            "bottleneck_dim": values["bottleneck_size"],
            "bottleneck_bias": values["bottleneck_size"] is not None,
            "dim": values["hidden_size"],
            "depth": values["depth"],
            "num_heads": values["num_heads"],
            "mlp_ratio": values["mlp_ratio"],
            "text_dim": values["context_in_dim"],
            "dropped_caption": "empty_caption",
            "time_factor": values["time_factor"],
            "size_vector": values["resolution_embeds"],
            "rotary_theta": values["theta"],
        }
    )


def transformer_settings(config: TransformerConfig) -> dict[str, Any]:
    """config.json of a patch transformer: what `transformer_config` reads as this one.

    Raises:
        ValueError: `why_not` has a reason.
    """
    if reason := why_not(config):
        raise ValueError(reason)
    half = config.dim // config.num_heads // 2
    return {
        "_class_name": CLASS,
        "in_channels": config.in_channels,
        "patch_size": config.patch_px,
        "context_in_dim": config.text_dim,
        "hidden_size": config.dim,
        "mlp_ratio": config.mlp_ratio,
        "num_heads": config.num_heads,
        "depth": config.depth,
        "axes_dim": [half, half],
        "theta": config.rotary_theta,
        "time_factor": config.time_factor,
        "time_max_period": 10_000,
        "bottleneck_size": config.bottleneck_dim,
        "resolution_embeds": config.size_vector,
    }


def why_not(config: object) -> str | None:
    """Why a network is no PRX transformer, as a setting and its value; None if it is one."""
    if not isinstance(config, TransformerConfig):
        return "family is not 'transformer'"
    for name, value in (_FIXED | _ABSENT).items():
        if getattr(config, name) != value:
            return f"{name} is {getattr(config, name)!r}, not {value!r}"
    if not isinstance(config.text_dim, int):
        return f"text_dim is {config.text_dim!r}, not one width"
    if config.out_channels != config.in_channels:
        return f"out_channels is {config.out_channels}, not {config.in_channels} as in_channels"
    if config.bottleneck_bias != (config.bottleneck_dim is not None):
        return f"bottleneck_bias is {config.bottleneck_bias} for bottleneck_dim {config.bottleneck_dim}"
    return None


def transformer_weights(tensors: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The parameters of `config.build()`, by name, from those of diffusers' model.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    return match_parameters(_ours(tensors), config)


def diffusers_tensors(parameters: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The tensors of diffusers' model, by name, from the parameters of a network of this configuration."""
    plain = {ours: theirs for theirs, ours in _PLAIN.items()}
    in_block = {ours: theirs for theirs, ours in _IN_BLOCK.items()}
    found: dict[str, Tensor] = {}
    for name, values in parameters.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            layer, _, kind = name.rpartition(".")
            found[f"{plain[layer]}.{kind}"] = values
            continue
        block, layer, kind = match.groups()
        if layer == "attention.to_q":
            keys = parameters[f"{block}.attention.to_kv.{kind}"]
            found[f"{block}.{_QKV}.{kind}"] = torch.cat([values, keys])
        elif layer == "expand":
            up, gate = values.chunk(2)
            found |= {f"{block}.{_GATE}.{kind}": gate, f"{block}.{_UP}.{kind}": up}
        elif layer != "attention.to_kv":
            found[f"{block}.{in_block[layer]}.{kind}"] = values
    return {name: values.contiguous() for name, values in found.items()}


def _ours(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """(name there, name here, values)."""
    for name, values in tensors.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            layer, _, kind = name.rpartition(".")
            yield name, f"{_PLAIN.get(layer, layer)}.{kind}", values
            continue
        block, layer, kind = match.groups()
        if layer == _QKV:
            width = values.shape[0] // 3
            yield name, f"{block}.attention.to_q.{kind}", values[:width]
            yield name, f"{block}.attention.to_kv.{kind}", values[width:]
        elif layer == _UP:
            gate = tensors.get(f"{block}.{_GATE}.{kind}")
            if gate is None or gate.shape != values.shape:
                raise ValueError(f"{block}.{_GATE}.{kind} is missing, or not of the shape of {name}")
            yield name, f"{block}.expand.{kind}", torch.cat([values, gate])
        elif layer != _GATE:
            yield name, f"{block}.{_IN_BLOCK.get(layer, layer)}.{kind}", values
