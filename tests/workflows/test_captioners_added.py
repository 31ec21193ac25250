"""A captioner added to a finished store: what was there stays, and its captions are filtered and taken by weight."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from imagen_core.store import Store, verify_store
from imagen_core.train.data.store import open_store
from tests.caption_server import Asked, CaptionServer, serve
from tests.imagen_core.train.small import BASE, BASE_UNET, make_config
from tests.runs import precompute, store_bytes
from tests.workflows.test_captioners import captioner, probes_left_out

SMALL = ("source.num_samples=50", "shard_size=20", "images.sizes_px=[16]", "keep_originals=true")
WEIGHTS = {"long": 0.7, "original": 0.3}


class Lengths(CaptionServer):
    """Captions of 1 to 20 words."""

    def caption(self, asked: Asked) -> str:
        return " ".join(f"w{number}" for number in range(1 + int(asked.number, 16) % 20))


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A run with a captioner, which tests must not change, and the files of its store before that was added."""
    out = tmp_path_factory.mktemp("added") / "run"
    precompute(out, *SMALL)
    before = store_bytes(out)
    with serve(Lengths()) as server:
        precompute(out, *SMALL, captioner(server))
        assert len(probes_left_out(server)) == len(Store.open(out / "store"))
    return out, before


@pytest.mark.slow
def test_only_the_new_set_and_its_embeddings_are_made(added: tuple[Path, dict[str, bytes]]) -> None:
    out, before = added
    after = store_bytes(out)
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"captions-long", "text-t5-long"}
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    assert verify_store(out / "store").ok


@pytest.mark.slow
def test_its_captions_are_filtered_by_their_length(added: tuple[Path, dict[str, bytes]]) -> None:
    path = added[0] / "store"
    store = Store.open(path)
    tokens = {sample.key: len(sample.set_texts["long"]["t5"][0]) for sample in store}
    expected = [key for key, count in tokens.items() if count > 20]
    assert 0 < len(expected) < len(store)
    condition = "caption_tokens.long > 20"
    assert [sample.key for sample in store.where(condition)] == expected
    width = store.text_group("t5").dim
    denoiser = BASE | {"unet": BASE_UNET | {"text_dim": width}}
    assert len(open_store(make_config(path, denoiser=denoiser, where=condition))) == len(expected)


@pytest.mark.slow
def test_a_weighted_mix_has_its_shares_and_resumes_with_another_world_size(
    added: tuple[Path, dict[str, bytes]],
) -> None:
    store = Store.open(added[0] / "store")
    options: dict[str, Any] = {"text": "t5", "captions": True, "caption_sets": WEIGHTS, "seed": 0}
    shares: Counter[str] = Counter()
    loader = store.loader(batch_size=len(store), **options)
    while shares.total() < 10_000:
        shares.update("long" if c.startswith("w0") else "original" for b in loader for c in b["captions"])
    for name, weight in WEIGHTS.items():
        assert abs(shares[name] / shares.total() - weight) < 0.01

    alone = pairs(store.loader(batch_size=4, **options))
    begun = store.loader(batch_size=4, **options)
    first = {
        k: c for _, b in zip(range(3), begun, strict=False) for k, c in zip(b["keys"], b["captions"], strict=True)
    }
    rest: dict[str, str] = {}
    for rank in range(3):
        loader = store.loader(batch_size=2, **options, rank=rank, world_size=3)
        loader.load_state_dict(begun.state_dict())
        rest |= pairs(loader)
    assert first.keys().isdisjoint(rest)
    assert first | rest == alone
    assert {caption.startswith("w0") for caption in rest.values()} == {True, False}


def pairs(loader: Any) -> dict[str, str]:
    """Key and caption of the samples of an epoch."""
    return {key: c for batch in loader for key, c in zip(batch["keys"], batch["captions"], strict=True)}
