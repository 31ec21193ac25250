"""Images of a sampling that cannot be read are generated again; a record that cannot be read is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import StaleOutputError
from stages.sampling.caption_sets import Caption
from stages.sampling.outputs import ImageFolder
from stages.sampling.requests import ImageRequest

REQUESTS = [ImageRequest(index, Caption(f"prompt {index}"), index) for index in range(5)]
RECORD = {"settings": {"seed": 1}, "images": [{"file": each.name, "seed": each.seed} for each in REQUESTS]}


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    """Five images of noise, with their record and their texts."""
    folder = ImageFolder(tmp_path, REQUESTS, (8, 16))
    folder.claim(RECORD, "out", restart=False, alone=True)
    rng = np.random.default_rng(0)
    pixels = {size: rng.integers(0, 256, (5, size, size, 3), dtype=np.uint8) for size in (8, 16)}
    folder.write_images(REQUESTS, pixels)
    folder.write_texts(REQUESTS)
    return folder


def test_damaged_images_are_missing_and_whole_ones_are_not(folder: ImageFolder) -> None:
    assert folder.remove_damaged(REQUESTS) == 0
    assert not folder.missing()
    paths = [folder.path(request, 16) for request in REQUESTS]
    data = paths[0].read_bytes()
    paths[0].write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    paths[1].write_bytes(paths[1].read_bytes()[:300])
    paths[2].write_bytes(b"")
    assert folder.remove_damaged(REQUESTS) == 3
    assert folder.missing() == REQUESTS[:3]


def test_a_text_that_is_not_the_prompt_is_written_again(folder: ImageFolder) -> None:
    texts = [folder.path(request, 8).with_suffix(".txt") for request in REQUESTS]
    before = [text.stat().st_mtime_ns for text in texts]
    texts[0].write_bytes(b"\xff")
    texts[1].unlink()
    folder.write_texts(REQUESTS)
    assert [text.read_text() for text in texts] == [f"prompt {index}\n" for index in range(5)]
    assert [text.stat().st_mtime_ns for text in texts[2:]] == before[2:]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda record: record.unlink(), "images.json is missing, so nothing says how they were made"),
        (lambda record: record.write_bytes(b""), r"images.json: cannot be read .* so nothing says how they were made"),
        (lambda record: record.write_bytes(b'{"images": 5}'), "so nothing says how they were made"),
        (lambda record: record.write_bytes(record.read_bytes().replace(b"1", b"2", 1)), "json: was changed since"),
    ],
)
def test_images_whose_record_is_lost_or_damaged_are_refused_by_name(
    folder: ImageFolder, spoil: Callable[[Path], object], words: str
) -> None:
    spoil(folder.root / "images.json")
    with pytest.raises(StaleOutputError, match=words):
        folder.claim(RECORD, "out", restart=False, alone=True)
    folder.claim(RECORD, "out", restart=True, alone=True)
    assert folder.missing() == REQUESTS


def test_a_record_of_an_earlier_version_has_no_digest_and_is_compared(folder: ImageFolder) -> None:
    (folder.root / "images.json").write_text(json.dumps(RECORD))
    folder.claim(RECORD, "out", restart=False, alone=True)
    assert not folder.missing()
    with pytest.raises(StaleOutputError, match=r"settings.seed: 1 -> 2"):
        folder.claim({**RECORD, "settings": {"seed": 2}}, "out", restart=False, alone=True)
