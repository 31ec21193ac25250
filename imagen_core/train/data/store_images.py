"""The condition images of a training, and the features it is aligned with: arrays of the store."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from imagen_core.condition_images import joined_images, stored_images
from imagen_core.store import MIRRORED, Store
from imagen_core.store.read.features import FeatureReader
from imagen_core.train.config import TrainConfig
from imagen_core.train.errors import TrainError


def check_condition_images(store: Store, config: TrainConfig) -> None:
    """Raises TrainError unless the store has the arrays that `condition_images` names, as images."""
    for name, channels in config.condition_images.items():
        if name not in store.arrays:
            raise TrainError(
                f"condition_images: {name!r} is no array of the store {config.store} (arrays: {store.arrays}); add it "
                "with `pipeline run precompute` and a stage that makes it, or name another"
            )
        spec = store.array_group(name).spec
        axes = len(spec.shape)
        found = 1 if axes == 2 else spec.shape[2] if axes == 3 else None
        if spec.dtype not in ("uint8", "bool") or found is None:
            raise TrainError(
                f"condition_images: the array {name!r} is {spec}, and no image; name one of uint8 or bool, of "
                "(height, width) or (height, width, channels)"
            )
        if found != channels:
            raise TrainError(
                f"condition_images.{name} is {channels}, but the array has {found} channels; set it to {found}, and "
                "denoiser.unet.condition_channels to the sum"
            )


def check_features(store: Store, config: TrainConfig) -> None:
    """Raises TrainError unless the store has the features that `alignment` reads, and those of mirrored images where
    images are flipped."""
    if config.alignment is None:
        return
    name = config.alignment.encoder
    try:
        found = FeatureReader(store, name)
    except ValueError as error:
        raise TrainError(
            f"alignment.encoder: {error}, in the store {config.store}; add them with `pipeline run precompute` and "
            f"image_encoders=[{{name: {name}, kind: auto, ...}}], or null alignment"
        ) from error
    if config.views.horizontal_flip and not found.has_mirrored:
        raise TrainError(
            f"views.horizontal_flip: the store {config.store} has no array {name}{MIRRORED}, the features of mirrored "
            f"images; add them with mirrored: true of the image encoder {name}, or set views.horizontal_flip=0"
        )


def condition_images(
    raw: Mapping[str, Any],
    channels: Mapping[str, int],
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor | None:
    """What the network reads of a batch of the store's loader: (b, k, *shape); None if it reads no further images.

    Args:
        channels: of each array, in their order.
    """
    if not channels:
        return None
    arrays, sizes = raw["arrays"], raw["array_sizes"]
    images = {name: stored_images(arrays[name], sizes.get(name), shape, device, dtype) for name in channels}
    found = joined_images(images, channels, shape)
    return found if len(found) else found.new_zeros(1, *found.shape[1:])  # as for the other tensors of no row
