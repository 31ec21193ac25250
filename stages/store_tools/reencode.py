"""`pipeline verify --reencode`: encodes some of the captions again, and compares with what the store has.

It is the only check that runs the model: all others compare stored data with stored data.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import xxhash

from imagen_core.store import TOLERANCE, Problem, Store, TextGroup, restore, token_errors
from pipeline.errors import ConfigError
from stages.encoders.encoder import load_encoder
from stages.encoders.given import KIND as GIVEN
from stages.encoders.loading import threads_of_process
from stages.encoders.probe import STORE_TOLERANCE, probe_problem, take_probe
from stages.encoders.prompts import load_matching_encoder
from stages.encoders.registry import AnyEncoder

_CAPTIONS_AT_ONCE = 128


@dataclass(slots=True)
class Comparison:
    """New encodings of one encoder against the stored ones, including the encoding of ""; errors are over tokens.

    Attributes:
        tolerance: allowed relative error of a token: length of the difference over the length of the new encoding.
            It bounds the cosine too: at least sqrt(1 - tolerance^2).
        max_absolute_error: of one element.
        probe: whether the store's probe "agrees" with the encoder or "differs"; "not recorded" by earlier versions.
    """

    tolerance: float
    captions: int = 0
    tokens: int = 0
    mean_cosine: float = 1.0
    min_cosine: float = 1.0
    max_absolute_error: float = 0.0
    max_relative_error: float = 0.0
    probe: str = "not recorded"
    problems: list[Problem] = field(default_factory=list)

    def summary(self) -> dict[str, float | str]:
        """Everything but the problems."""
        return {name: value for name, value in asdict(self).items() if name != "problems"}

    def add(self, file: str, caption: str, stored: np.ndarray, encoded: np.ndarray) -> None:
        """Compares the (n_tokens, dim) embeddings of one caption; of layers stored apart each counts as a token."""
        self.captions += 1
        if stored.ndim == 3 and encoded.shape == (len(stored), stored[0].size if len(stored) else encoded.shape[1]):
            stored, encoded = (one.reshape(-1, stored.shape[2]) for one in (stored, encoded))
        if stored.shape != encoded.shape:
            message = f"caption {caption!r}: {_tokens(stored)} stored, {_tokens(encoded)} when encoded again"
            self.problems.append(Problem(file, message))
            return
        errors = token_errors(stored, encoded)
        relative = float(errors.relative.max(initial=0.0))
        least = float(errors.cosine.min(initial=1.0))
        self.mean_cosine += (float(errors.cosine.sum()) - len(stored) * self.mean_cosine) / (self.tokens + len(stored))
        self.tokens += len(stored)
        self.min_cosine = min(self.min_cosine, least)
        self.max_absolute_error = max(self.max_absolute_error, float(errors.absolute.max(initial=0.0)))
        self.max_relative_error = max(self.max_relative_error, relative)
        if not relative <= self.tolerance:
            message = (
                f"caption {caption!r}: encoded again, a token differs by {relative:.2%} (cosine {least:.4f}); "
                f"{self.tolerance:.2%} are allowed"
            )
            self.problems.append(Problem(file, message))


def reencode(
    store: Store,
    fraction: float,
    *,
    seed: int,
    models: Mapping[str, str],
    encoders: Mapping[str, AnyEncoder] | None = None,
) -> dict[str, Comparison]:
    """Encodes a fraction of the distinct captions again, with each encoder of the store that has a model.

    A caption is chosen by a hash of its text and the seed: always the same ones, for any shards. One shard's
    files and 128 captions are in memory at a time.

    Args:
        fraction: in (0, 1]; at least one caption is taken, and the encoding of "".
        models: where the models are now (hub id or folder), by encoder name; others are where their names say.
        encoders: of embeddings that came with the data, what is said to have made them; without it they are left out.
    Raises:
        ConfigError: a name that is no encoder, or a model that differs from the one the store was made with.
        MachineError: a model cannot be found.
    """
    if unknown := sorted(set(models) - set(store.encoders)):
        raise ConfigError(f"--encoder-model {unknown[0]}=...: the store has no such encoder; it has {store.encoders}")
    encoders = encoders or {}
    given = [name for name in store.encoders if store.text_group(name).fingerprint.get("kind") == GIVEN]
    if not_given := sorted(set(encoders) - set(given)):
        raise ConfigError(
            f"--encoder {not_given[0]}=...: is for embeddings that came with the data, which are {given}; where "
            "another encoder's model is now, --encoder-model says"
        )
    encoded = [name for name in store.encoders if name not in given or name in encoders]
    return {name: _compare(store, name, models.get(name), encoders.get(name), fraction, seed) for name in encoded}


def _chosen(store: Store, caption_set: str | None, fraction: float, seed: int) -> Iterator[tuple[int, int, str]]:
    """(shard position, caption id, caption) of the captions to encode, of `samples` or of a further set; captions of
    excluded samples do not count."""
    least: tuple[int, int, int, str] | None = None
    found = False
    for position in range(store.manifest.num_shards):
        for caption_id, caption in _captions(store, position, caption_set).items():
            number = xxhash.xxh3_64_intdigest(caption.encode(), seed=seed)
            if number < fraction * 2**64:
                found = True
                yield position, caption_id, caption
            least = min(least or (number + 1, 0, 0, ""), (number, position, caption_id, caption))
    if least is not None and not found:
        yield least[1:]


def _captions(store: Store, position: int, caption_set: str | None) -> dict[int, str]:
    if not store.manifest.rows[position]:
        return {}
    files = store.shard(position)
    excluded = store.manifest.excluded.get(position, {})
    if caption_set is None:
        found = zip(files.samples.column("caption_ids"), files.samples.column("captions"), strict=True)
    else:
        found = ((row.ids, row.captions) for row in files.caption_sets[caption_set].rows())
    rows = enumerate(found)
    return {i: c for row, (ids, captions) in rows if row not in excluded for i, c in zip(ids, captions, strict=True)}


def _compare(
    store: Store, name: str, model: str | None, stated: AnyEncoder | None, fraction: float, seed: int
) -> Comparison:
    group = store.text_group(name)
    if stated is None:
        described = {"name": name, "dim": group.dim, "dtype": group.dtype, "fingerprint": group.fingerprint}
        encoder = load_matching_encoder(described, model, use_gpu=True, option=f"--encoder-model {name}=...")
    else:
        encoder = load_encoder(stated, threads_of_process())
    result = Comparison(_tolerance(group, store.manifest.header["groups"][group.name]))
    recorded = store.probe(name)
    if recorded is not None and group.probe is not None:
        problem = probe_problem(recorded, take_probe(encoder), encoder.config.compute_dtype)
        result.probe = "agrees" if problem is None else "differs"
        result.problems += [] if problem is None else [Problem(group.probe.path, problem)]
    further = {of: found.name for (by, of), found in store.manifest.set_texts.items() if by == name}
    for caption_set, files in {None: group.name, **further}.items():
        chosen = _chosen(store, caption_set, fraction, seed)
        while batch := list(islice(chosen, _CAPTIONS_AT_ONCE)):
            embeddings = encoder.encode([caption for _, _, caption in batch]).embeddings
            for (position, caption_id, caption), encoded in zip(batch, embeddings, strict=True):
                entry, opened = store.manifest.file(files, position), store.shard(position)
                assert entry is not None
                file = opened.text[name] if caption_set is None else opened.set_texts[name, caption_set]
                stored = restore(file.stored(caption_id), group.dtype)
                if caption_set is None or len(stored):  # without tokens: it could not be encoded, and is not read
                    result.add(entry.path, caption, stored, encoded)
    if group.null is not None:
        result.add(group.null.path, "", store.null(name), encoder.encode([""]).embeddings[0])
    return result


def _tolerance(group: TextGroup, config: Mapping[str, Any]) -> float:
    compute = TOLERANCE.get(str(group.fingerprint.get("compute_dtype")), max(TOLERANCE.values()))
    if group.dtype == "int8":  # both sides have about the same length: |a - b|^2 = 2 |a| |b| (1 - cosine)
        return compute + math.sqrt(2 * (1 - config.get("min_cosine", 0.99)))
    return compute + STORE_TOLERANCE[group.dtype]


def _tokens(embedding: np.ndarray) -> str:
    return f"{embedding.shape[0]} tokens of {embedding.shape[1]}"
