"""Which settings of a model and of its tokenizer decide the embeddings; for the fingerprint, in readable form."""

import json
from collections.abc import Mapping
from typing import Any

from imagen_core.store import LATER_FIELDS, comparable, comparable_records, record_probe_differences
from pipeline.fingerprint import differences, digest

_INERT = frozenset(
    (
        *(
            "_name_or_path",
            "_commit_hash",
            "transformers_version",
            "architectures",
            "auto_map",
            "dtype",
            "torch_dtype",
        ),
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript"),
        *("finetuning_task", "id2label", "label2id", "problem_type", "task_specific_params"),
    )
)
"""Who wrote the file and in which type, what a model returns beside its states, and what heads that are not loaded
are for."""
_LONGEST_TEXT, _LONGEST_LIST = 200, 64
"""Characters of a string, and entries of a list or mapping, above which its digest stands for it."""
_NOT_STATE = ("version", "truncation", "padding", "decoder", "added_tokens")


def acting_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the settings that cannot change an embedding.

    Left out are those of `_INERT`, and rates of dropout, which a frozen model has not; also in nested parts. A setting
    that is not known counts as one that acts.
    """
    return {
        key: acting_settings(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _INERT and not _is_dropout(key)
    }


def _is_dropout(key: str) -> bool:
    return key.endswith(("dropout", "dropout_rate", "dropout_prob", "_pdrop"))


def tokenizer_settings(tokenizer: Any, empty_token: str | None) -> dict[str, Any]:
    """What decides the token ids: the class that transformers built, and the state that it has after loading.

    Settings that are null, false or empty are left out, so that a library may name a new one which is not in use.

    Args:
        tokenizer: of transformers.
        empty_token: the token that stands for "", if the tokenizer gives it none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        added = state["added_tokens"]
        parts = {key: value for key, value in state.items() if key not in _NOT_STATE}
    else:
        added = [repr(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
        parts = {"vocabulary": tokenizer.get_vocab()}
    settings = {
        "class": type(tokenizer).__name__,
        "truncation_side": tokenizer.truncation_side,
        "special_tokens": dict(tokenizer.special_tokens_map),
        "added_tokens": {"number": len(added), "sha256": digest(added)},
        "empty_token": empty_token,
        **parts,
    }
    return _without_unset(settings)


def _without_unset(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= _LONGEST_TEXT else f"sha256 {digest(value)}"
    if isinstance(value, Mapping | list | tuple) and len(value) > _LONGEST_LIST:
        return f"{len(value)} entries, sha256 {digest(value)}"
    if isinstance(value, Mapping):
        kept = {str(key): _without_unset(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if not _is_unset(item)}
    if isinstance(value, list | tuple):
        return [_without_unset(item) for item in value]
    return value if value is None or isinstance(value, int | float) else str(value)


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value in ("", {}, [])


def identity_changes(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """`field: recorded -> found` for each field that differs; fields that an earlier version did not record do not."""
    return differences(*comparable(recorded, found))


def record_changes(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The same of whole records of encoders (name, dim, dtype, fingerprint), and of their probes if both have one."""
    return [*differences(*comparable_records(recorded, found)), *record_probe_differences(recorded, found)]


def is_complete(fingerprint: Mapping[str, Any]) -> bool:
    """Whether a fingerprint has all fields; those of earlier versions lack some."""
    return all(name in fingerprint for name in LATER_FIELDS)


def identity_to_keep(found: dict[str, Any], started: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fingerprint for a group of a run folder: the one it was started with, if nothing that it records differs.

    So a run that an earlier version started goes on, and all its files name one encoder.

    Args:
        found: the encoder's fingerprint now.
        started: what the group was started with (`read_group_fingerprint`); None if it is new.
    """
    config = (started or {}).get("config")
    recorded = config.get("fingerprint") if isinstance(config, Mapping) else None
    if not isinstance(recorded, Mapping) or identity_changes(recorded, found):
        return found
    return dict(recorded)
