"""What a plan of a training says of the sets of captions that it reads, and of snapshots."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from stages.training.dry_run import dry_run_summary
from tests.imagen_core.store.caption_sets_added import add_caption_sets
from tests.imagen_core.train.small import TRANSFORMER, TRANSFORMER_UNET, make_config, make_store


def test_a_plan_names_the_sets_of_captions_that_are_read(tmp_path: Path) -> None:
    sets, plain = make_store(tmp_path / "sets"), make_store(tmp_path / "plain")
    add_caption_sets(sets, {"brief": lambda *_: ["brief"]}, {"long": 0.75, "brief": 0.25})
    without = dry_run_summary(make_config(plain))
    first = dry_run_summary(make_config(sets, captions={"long": 1.0}))
    assert first["store_now"] == without["store_now"]
    assert first["store_groups_needed"] == without["store_groups_needed"] == ["images-16", "text-t5"]
    both = dry_run_summary(make_config(sets))
    assert both["store_groups_needed"] == ["images-16", "text-t5", "captions-brief", "text-t5-brief"]
    assert "captions long 0.75, brief 0.25" in str(both["store_now"])
    online = dry_run_summary(make_config(sets), online=True)
    assert online["store_groups_needed"] == ["images-16", "captions-brief"]
    mixed = dry_run_summary(make_config(None, stores=[{"path": str(sets)}, {"path": str(plain)}]))
    assert mixed["store_groups_needed"] == both["store_groups_needed"]
    now = mixed["stores_now"]
    assert isinstance(now, dict)
    assert "captions original 1" in now["plain"]


def test_a_plan_counts_profiles_as_averages_and_the_disk_space_of_their_snapshots(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    plain = dry_run_summary(make_config(store, ema={"rates": [0.9]}))
    ema = {"rates": [0.9], "profiles": [0.05, 0.1], "snapshot_every_steps": 4}
    found = dry_run_summary(make_config(store, num_steps=10, ema=ema))
    parameters = plain["parameters"]
    assert isinstance(parameters, int)
    assert (plain["averages_bytes"], found["averages_bytes"]) == (4 * parameters, 3 * 4 * parameters)
    assert (found["snapshots"], found["snapshots_disk_bytes"]) == (3, 3 * 2 * 2 * parameters)
    assert "snapshots" not in plain


def test_an_alignment_adds_its_projector_and_its_features(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", rows=(4,), features=5)
    config = make_config(store, denoiser=TRANSFORMER)
    plain = dry_run_summary(config)
    aligned = {"encoder": "dino", "block": 1, "hidden_dim": 16}
    found = dry_run_summary(make_config(store, denoiser=TRANSFORMER, alignment=aligned))
    width = TRANSFORMER_UNET["dim"]
    parameters = (width + 1) * 16 + 17 * 16 + 17 * 5
    assert found["projector_parameters"] == parameters
    assert found["memory_bytes"] == plain["memory_bytes"] + 16 * parameters  # type: ignore[operator]
    assert "array-dino" in found["store_groups_needed"]  # type: ignore[operator]
    absent = dry_run_summary(make_config(tmp_path / "none", denoiser=TRANSFORMER, alignment=aligned))
    assert "projector_parameters" not in absent
    with pytest.raises(ConfigError, match=r"alignment\.block: 3 is none of the 2 blocks"):
        dry_run_summary(make_config(tmp_path / "none", denoiser=TRANSFORMER, alignment={**aligned, "block": 3}))
