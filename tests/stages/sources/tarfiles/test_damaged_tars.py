"""Tars damaged at random: what is whole is a sample, and samples, drops and unread bytes account for every byte."""

import gzip
import io
import random
import re
import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from stages.sources.base import Original
from stages.sources.tars import WebdatasetConfig
from tests.images import plain_png
from tests.stages.sources.reading import read_originals, tar_bytes

BLOCK = 512
PNG = plain_png()


def members_of(samples: int, rng: random.Random, first: int = 0) -> list[tuple[str, bytes]]:
    """A PNG with some bytes behind it and a caption each; no member is like another."""
    members: list[tuple[str, bytes]] = []
    for number in range(first, first + samples):
        members.append((f"{number:05d}.png", PNG + rng.randbytes(rng.randrange(4000))))
        members.append((f"{number:05d}.txt", b"caption %d" % number))
    return members


@lru_cache(maxsize=1)
def places(tar: bytes) -> dict[bytes, tuple[int, int]]:
    """Start and end, header and padding included, of each sample by its caption, in a tar of pairs of members."""
    found = {}
    start = 0
    with tarfile.open(fileobj=io.BytesIO(tar), ignore_zeros=True) as archive:
        for member in archive:
            if member.name.endswith(".png"):
                start = member.offset
            else:
                end = member.offset_data + BLOCK
                found[tar[member.offset_data : member.offset_data + member.size]] = (start, end)
    return found


def bad_header(tar: bytes, rng: random.Random) -> bytes:
    start, _ = rng.choice(list(places(tar).values()))
    place = start + rng.randrange(257)
    return tar[:place] + bytes([tar[place] ^ (1 + rng.randrange(255))]) + tar[place + 1 :]


def page_of_zeros(tar: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(tar) // 4096) * 4096
    return tar[:start] + bytes(len(tar[start : start + 4096])) + tar[start + 4096 :]


def page_of_noise(tar: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(tar) // 4096) * 4096
    return tar[:start] + rng.randbytes(len(tar[start : start + 4096])) + tar[start + 4096 :]


def cut(tar: bytes, rng: random.Random) -> bytes:
    return tar[: rng.randrange(len(tar) - 12_000)]


def cut_between(tar: bytes, rng: random.Random) -> bytes:
    return tar[: rng.choice(list(places(tar).values()))[1]]


def hole(tar: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(tar) - 12_000)
    return tar[:start] + tar[start + rng.randrange(1, 10_000) :]


def bad_join(tar: bytes, rng: random.Random) -> bytes:
    more = bytearray(tar_bytes(members_of(3, rng, first=50_000)))
    more[rng.randrange(257)] ^= 1 + rng.randrange(255)
    return tar + bytes(more)


def rubbish_behind(tar: bytes, rng: random.Random) -> bytes:
    return tar + rng.randbytes(rng.randrange(1, 3000))


DAMAGES = (bad_header, page_of_zeros, page_of_noise, cut, cut_between, hole, bad_join, rubbish_behind)


def check_accounting(folder: Path, damaged: bytes, whole: dict[bytes, bytes]) -> int:
    """Checks one damaged tar against the bytes of each sample by caption; how many bytes were not read."""
    path = folder / "a.tar"
    path.write_bytes(damaged)
    source = WebdatasetConfig(path=str(path)).build()
    (shard,) = source.shards(10_000)
    listed = source.rows_of(shard)
    rows: list[Original] = []
    source.fetch(shard, listed, folder, lambda original: rows.append(original.cleaned()))
    kept = {row.captions[0].encode(): row.data for row in rows if row.reason is None and row.captions}
    assert len(kept) == sum(row.reason is None for row in rows)
    left, unread = bytearray(damaged), source.unread_bytes
    for row in listed:
        for offset, size in (span for kind, span in row.payload[0].items() if kind != "drop"):
            end = min(len(left), offset + -(-size // BLOCK) * BLOCK)
            left[offset - BLOCK : end] = bytes(end - offset + BLOCK)
    assert len(left) - left.count(0) <= unread, "bytes that are in no member are not counted"
    lost = {caption for caption in whole if caption not in kept}
    for caption in lost:  # behind a hole, a member takes the next ones for its own bytes
        assert whole[caption] not in left, f"{caption!r} is whole and not read"
    drops = [row for row in rows if row.reason is not None]
    assert drops or not lost, f"{len(lost)} samples vanished"
    assert unread == 0 or any(row.reason == "damaged_tar" for row in drops)
    return unread


def damage_tars(folder: Path, samples: int, tries: int, seed: int = 0) -> int:
    rng = random.Random(seed)
    tar = tar_bytes(members_of(samples, rng))
    whole = {caption: tar[start : end - BLOCK + len(caption)] for caption, (start, end) in places(tar).items()}
    assert len(whole) == samples
    unread = 0
    for number in range(tries):
        damage: Callable[[bytes, random.Random], bytes] = DAMAGES[number % len(DAMAGES)]
        unread += check_accounting(folder, damage(tar, rng), whole)
    return unread


def test_samples_drops_and_unread_bytes_account_for_a_damaged_tar(tmp_path: Path) -> None:
    assert damage_tars(tmp_path, samples=20, tries=80) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_samples_drops_and_unread_bytes_account_for_tars_of_1000_samples(tmp_path: Path, seed: int) -> None:
    """200 damages in all."""
    assert damage_tars(tmp_path, samples=1000, tries=40, seed=seed) > 0


@pytest.mark.parametrize("place", [1, 5000])
def test_a_damaged_gzip_tar_counts_what_is_behind_the_damage(tmp_path: Path, place: int) -> None:
    tar = tar_bytes(members_of(40, random.Random(0)))
    half = places(tar)[b"caption 19"][1]
    first, second = gzip.compress(tar[:half]), bytearray(gzip.compress(tar[half:]))
    second[place : place + 100] = bytes(100)
    (tmp_path / "a.tar").write_bytes(first + second)
    rows = read_originals(WebdatasetConfig(path=str(tmp_path / "a.tar")).build(), 100)
    assert [row.key for row in rows if row.reason is None][:20] == [f"a/{number:05d}" for number in range(20)]
    (drop,) = [row for row in rows if row.reason == "damaged_tar"]
    assert drop.detail.startswith("the compressed data is damaged: ")
    found = re.search(r"; ([0-9,]+) (compressed )?bytes were not read$", drop.detail)
    assert found is not None
    assert len(second) - 2**15 < int(found[1].replace(",", "")) <= len(tar)
