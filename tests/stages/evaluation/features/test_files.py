"""Files of features."""

from pathlib import Path

import numpy as np

from stages.evaluation.features.base import Extracted
from stages.evaluation.features.files import read_extracted, write_features


def test_the_same_features_are_the_same_file_each_time(tmp_path: Path) -> None:
    extracted = Extracted({"features": np.ones((3, 4), np.float32)}, {"captions_truncated": 2, "an_other": 1})
    path = tmp_path / "features.safetensors"
    written = set()
    for _ in range(8):
        write_features(path, extracted, "clip")
        written.add(path.read_bytes())
    assert len(written) == 1
    assert read_extracted(path).counts == extracted.counts
