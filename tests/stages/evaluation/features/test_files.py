"""Files of features."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ConfigError
from stages.evaluation.features.base import Extracted
from stages.evaluation.features.files import read_extracted, read_features, write_features
from stages.evaluation.features.gather import FeatureCache


def test_the_same_features_are_the_same_file_each_time(tmp_path: Path) -> None:
    extracted = Extracted({"features": np.ones((3, 4), np.float32)}, {"captions_truncated": 2, "an_other": 1})
    path = tmp_path / "features.safetensors"
    written = set()
    for _ in range(8):
        write_features(path, extracted, _Model())
        written.add(path.read_bytes())
    assert len(written) == 1
    assert read_extracted(path).counts == extracted.counts


class _Model:
    label = "model"

    def fingerprint(self) -> dict[str, object]:
        return {"model": 1}


def test_features_that_were_changed_are_extracted_again_and_refused_as_a_users_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extracted = Extracted({"features": np.ones((3, 4), np.float32)}, {})
    cache, calls = FeatureCache(tmp_path), []

    def get() -> float:
        arrays = cache.get("images", "identity", _Model(), lambda: calls.append(1) or extracted).arrays
        return float(arrays["features"].sum())

    assert (get(), get(), len(calls)) == (12, 12, 1)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:100], b""):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"field: {path} "):
            read_features(path, "field")
        assert get() == 12
        assert path.read_bytes() == data
    assert len(calls) == 4
    assert caplog.text.count("it is made again") == 3
