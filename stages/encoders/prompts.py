"""Encodes prompts exactly as the captions a checkpoint was trained on."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from imagen_core.extensions import member_of
from imagen_core.store import PROBE, StoreDtype, cast_embedding, is_finite_as, restore
from pipeline.errors import ConfigError, MachineError
from stages.captions import clean_caption, is_valid_text
from stages.encoders.encoder import TextEncoder, load_encoder
from stages.encoders.given import KIND as GIVEN
from stages.encoders.identity import identity_changes
from stages.encoders.loading import threads_of_process
from stages.encoders.probe import probe_problem, take_probe
from stages.encoders.recipes.layers import as_recorded
from stages.encoders.registry import AnyEncoder

_PROMPTS_AT_ONCE = 1024


def encode_prompts(
    prompts: Sequence[str],
    trained_on: Mapping[str, Any],
    *,
    model: str | None = None,
    use_gpu: bool = True,
    option: str = "encoder_model",
) -> list[np.ndarray]:
    """Loads the encoder of a checkpoint and encodes prompts with it.

    Args:
        prompts: texts of any length; truncated to the encoder's max_tokens like captions.
        trained_on: `name`, `dim`, `dtype` and `fingerprint` of the text group the checkpoint was trained on, and the
            `layers` that it read of it, if they are stored apart.
        model: where the model is now (hub id or folder), if not where its name says.
        option: the key of `model`, for messages.
    Returns:
        float (num_tokens, dim) arrays, or (num_tokens, layers, dim), rounded as the store rounds them.
    Raises:
        ConfigError: the encoder found differs from the one trained on; names each field.
        MachineError: the model cannot be found.
    """
    bad = [prompt for prompt in prompts if not is_valid_text(prompt)]
    if bad:
        raise ConfigError(f"prompts: {bad[0]!r} is not valid text; write it in UTF-8")
    encoder = load_matching_encoder(trained_on, model, use_gpu=use_gpu, option=f"{option}=...")
    embeddings: list[np.ndarray] = []
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):  # the encoder's float32 is larger than what is kept
        part = [clean_caption(prompt) for prompt in prompts[start : start + _PROMPTS_AT_ONCE]]
        encoded = zip(part, encoder.encode(part).embeddings, strict=True)
        embeddings += [_as_stored(prompt, embedding, trained_on, encoder.layers) for prompt, embedding in encoded]
    return embeddings


def load_matching_encoder(made_by: Mapping[str, Any], model: str | None, *, use_gpu: bool, option: str) -> TextEncoder:
    """Loads the encoder that made a text group, after a check that it is the same one.

    Args:
        made_by: `name`, `dim`, `dtype` and `fingerprint` of the group, and its `probe` if there is one.
        model: where the model is now (hub id or folder), if not where its name says.
        option: how the user names `model`, for the message.
    Raises:
        ConfigError: the encoder found is another one; names each field. Or it gives other numbers, or the embeddings
            came with the data.
        MachineError: the model cannot be found.
    """
    if made_by["fingerprint"]["kind"] == GIVEN:
        raise ConfigError(
            f"encoder {made_by['name']}: its embeddings came with the data (made by "
            f"{made_by['fingerprint']['model']}, as their owner says), so no encoder here can encode other texts; to "
            "sample, encode the captions with `pipeline run precompute`, and train on these embeddings"
        )
    config = encoder_of(made_by, model, use_gpu=use_gpu)
    try:
        identity = config.identify()
    except (ConfigError, MachineError) as error:
        raise type(error)(f"encoder {made_by['name']}: {error}; its place now is {option}") from error
    changes = identity_changes(made_by["fingerprint"], identity.fingerprint)
    if model is not None:  # a folder may have another name than the one it was encoded from
        changes = [change for change in changes if not change.startswith(("model:", "revision:"))]
    if changes:
        raise ConfigError(
            f"encoder {config.model}: differs from the one the embeddings were made with: {'; '.join(changes)}; "
            f"give the right model with {option}"
        )
    encoder = load_encoder(config, threads_of_process())
    if PROBE in made_by:
        problem = probe_problem(made_by[PROBE], take_probe(encoder), config.compute_dtype)
        if problem is not None:
            raise ConfigError(f"encoder {config.model}: {problem}; install the versions that made them")
    return encoder


def encoder_of(trained_on: Mapping[str, Any], model: str | None, *, use_gpu: bool) -> AnyEncoder:
    """The configuration of the encoder that made a text group.

    Raises:
        ConfigError: it is of a kind that no installed package defines.
    """
    fingerprint = trained_on["fingerprint"]
    try:
        encoder_class = member_of(AnyEncoder, fingerprint["kind"])
    except ValueError as error:
        raise ConfigError(f"encoder {trained_on['name']}: {error}") from error
    return encoder_class.from_fingerprint(
        trained_on["name"], fingerprint, model=model, num_gpus=None if use_gpu else 0
    )


def _as_stored(prompt: str, encoded: np.ndarray, trained_on: Mapping[str, Any], layers: Sequence[int]) -> np.ndarray:
    dtype, embedding = cast(StoreDtype, trained_on["dtype"]), as_recorded(encoded, trained_on, layers)
    if not len(embedding):
        raise ConfigError(f"prompts: the tokenizer leaves nothing of {prompt!r}; use another prompt, or the empty one")
    if not is_finite_as(embedding, dtype):
        raise ConfigError(f"prompts: an embedding is not finite as {dtype}; use another prompt")
    return restore(cast_embedding(embedding, dtype, trained_on.get("num_scales", 1)), dtype)
