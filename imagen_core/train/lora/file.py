"""An adapter as one safetensors file that peft and diffusers read: peft's names, and peft's settings as metadata."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from imagen_core.conversion.deepfloyd_unet import diffusers_names, why_not
from imagen_core.diffusion import Denoiser
from imagen_core.files import share, sort_metadata
from imagen_core.train.lora.adapter import MATRICES, adapter_layers, adapter_settings, saved_parameters

METADATA = "lora_adapter_metadata"
"""The entry of the file's metadata that diffusers reads: settings of `peft.LoraConfig` as JSON."""
_UNET = "unet."
"""Begins names and settings of a pipeline's UNet in diffusers' files."""


def write_adapter(path: Path, denoiser: Denoiser, origin: Mapping[str, str]) -> None:
    """Writes the adapter of a model that has one, float32 and without the base; the same model gives the same bytes.

    Of a network that diffusers has too, such as DeepFloyd IF's, tensors have its names, for `load_lora_weights`.
    Temporary names, fsync and renames are up to the caller.

    Args:
        origin: further entries of the metadata.
    """
    tensors = {name: values.detach().to("cpu", torch.float32) for name, values in saved_parameters(denoiser).items()}
    prefix = ""
    if why_not(denoiser.config.network) is None:
        tensors, prefix = diffusers_adapter(tensors), _UNET
    rank, alpha = adapter_settings(denoiser)
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": adapter_layers(tensors)}
    metadata = json.dumps({f"{prefix}{name}": value for name, value in settings.items()}, sort_keys=True)
    values = {f"{prefix}{name}": value.contiguous() for name, value in tensors.items()}
    save_file(values, path, metadata={"format": "pt", METADATA: metadata, **origin})
    sort_metadata(path)
    share(path)


def diffusers_adapter(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter of diffusers' UNet like this one of a Regular UNet.

    A layer that is two in diffusers, for keys and values, has A in both, and the first and second half of B's rows.
    """
    found: dict[str, Tensor] = {}
    for name, values in tensors.items():
        mark = next(mark for mark in MATRICES if mark in name)
        layer, _, last = name.removeprefix("net.").partition(mark)
        layers = [theirs.removesuffix(".weight") for theirs in diffusers_names(f"{layer}.weight")]
        parts = values.chunk(len(layers)) if mark == ".lora_B." else [values.clone() for _ in layers]
        found |= {f"{theirs}{mark}{last}": part for theirs, part in zip(layers, parts, strict=True)}
    return found
