"""The memory estimate against counts made by hand and by a real backward pass."""

import pytest
import torch

from imagen_core.diffusion import DenoiserConfig
from imagen_core.train.memory import MemoryEstimate, estimate_memory
from tests.imagen_core.models.count import count_parameters
from tests.imagen_core.models.small import inputs, regular


def estimate(batch: int = 1, *, num_shards: int = 1, **changes: object) -> MemoryEstimate:
    unet = regular(**changes)
    return estimate_memory(
        DenoiserConfig(unet=unet, size_px=16),
        micro_batch_size=batch,
        shape=(16, 16),
        num_tokens=6,
        bytes_per_activation=4,
        num_averages=2,
        num_shards=num_shards,
    )


@pytest.mark.slow
def test_weights_gradients_moments_and_averages_are_counted_in_float32() -> None:
    parameters = count_parameters(regular())
    found = estimate()
    assert (found.weights, found.gradients) == (4 * parameters, 4 * parameters)
    assert (found.optimizer, found.averages) == (8 * parameters, 8 * parameters)
    assert found.total == 24 * parameters + found.activations
    assert estimate(num_shards=4).weights == -(-4 * parameters // 4)


def test_activations_are_what_autograd_keeps() -> None:
    config = regular()
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    unet = config.build()
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    x, c_noise, conditioning = inputs(config, lengths=(6,))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = unet(x, c_noise, conditioning)
    real = sum(count for place, count in kept.items() if place not in weights)
    assert result.shape == x.shape
    assert estimate().activations == pytest.approx(real, rel=0.1)  # the attention matrix is not counted


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing() -> None:
    assert estimate(batch=5).activations == 5 * estimate().activations
    assert estimate(activation_checkpointing=True).activations < 0.5 * estimate().activations
