"""An adapter as one safetensors file that peft and diffusers read: peft's names, and peft's settings as metadata."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from imagen_core.diffusion import Denoiser
from imagen_core.files import share, sort_metadata
from imagen_core.train.lora.adapter import adapter_layers, adapter_settings, saved_parameters

METADATA = "lora_adapter_metadata"
"""The entry of the file's metadata that diffusers reads: settings of `peft.LoraConfig` as JSON."""


def write_adapter(path: Path, denoiser: Denoiser, origin: Mapping[str, str]) -> None:
    """Writes the adapter of a model that has one, float32 and without the base; the same model gives the same bytes.

    Temporary names, fsync and renames are up to the caller.

    Args:
        origin: further entries of the metadata.
    """
    tensors = {
        name: values.detach().to("cpu", torch.float32).contiguous()
        for name, values in saved_parameters(denoiser).items()
    }
    rank, alpha = adapter_settings(denoiser)
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": adapter_layers(tensors)}
    entries = {"format": "pt", METADATA: json.dumps(settings, sort_keys=True), **origin}
    save_file(tensors, path, metadata=entries)
    sort_metadata(path)
    share(path)
