"""Nothing is kept of a request that was answered, in workers or in the driver."""

import gc
import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages.captioners.base import Question
from stages.captioners.budget import Used
from stages.captioners.openai import OpenaiCaptionerConfig
from stages.precompute.captioning.make import MakeCaptionsStage
from tests.caption_server import MODEL, CaptionServer, serve
from tests.runs import precompute
from tests.workflows.test_captioners import captioner

pytestmark = pytest.mark.slow


def test_a_client_keeps_nothing_of_a_request() -> None:
    image = Image.new("RGB", (16, 16))
    objects, sizes = [], []
    with serve(CaptionServer(keep=False, fault=lambda asked: None)) as server:
        config = OpenaiCaptionerConfig(name="a", model=MODEL, prompt="Describe it.", base_url=server.url)
        client = config.start(Used)
        tracemalloc.start()
        try:
            for _ in range(4):
                rows = iter(range(300))
                answered = client.answers(
                    lambda rows=rows: next((Question(row, 0, 5, "Describe it.", image) for row in rows), None)
                )
                assert sum(answer.problem is None for _, answer in answered) == 300
                gc.collect()
                objects.append(len(gc.get_objects()))
                sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    assert objects[3] - objects[1] < 300, "of 600 requests"
    assert sizes[3] - sizes[1] < 600 * 100


def test_a_run_keeps_nothing_of_a_shard_but_its_entries_in_the_books(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inline executor, so driver and worker are one process."""
    objects: list[int] = []
    process: Any = MakeCaptionsStage.process

    def counted(stage: MakeCaptionsStage, task: Any) -> None:
        process(stage, task)
        gc.collect()
        objects.append(len(gc.get_objects()))

    monkeypatch.setattr(MakeCaptionsStage, "process", counted)
    config = ["source.num_samples=1200", "shard_size=100", "images.sizes_px=[]", "encoders=[]"]
    with serve(CaptionServer(keep=False)) as server:
        precompute(tmp_path / "run", *config, captioner(server, image_px=16))
    growth = [after - before for before, after in itertools.pairwise(objects[3:])]
    assert len(growth) == 8
    assert sorted(growth)[len(growth) // 2] < 50, "of 100 requests each"
