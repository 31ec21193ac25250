"""The device a configuration names."""

import os

import torch

from pipeline.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The device of this process, made the current one: under torchrun `auto` gives each its own GPU.

    Raises:
        ConfigError: there is no such device.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is not known to torch; use auto, cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"device: {name!r} is not there ({count} GPUs found); use auto or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the text encoder goes there too
    return device
