"""Every published model is rebuilt to the last parameter."""

import pytest
from pydantic import TypeAdapter, ValidationError
from torch import nn

from imagen_core.models import UNetConfig
from imagen_core.models.presets.priors import PRIOR_PRESETS
from imagen_core.models.presets.unets import PRESETS, list_presets
from imagen_core.store.buckets import bucket_shapes, scaled
from tests.imagen_core.models.count import build_on_meta
from tests.imagen_core.models.presets.published import TABLE


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TABLE))
def test_a_published_model_has_its_exact_number_of_parameters(name: str):
    preset = PRESETS[name]
    unet = build_on_meta(preset.config)
    assert sum(p.numel() for p in unet.parameters()) == preset.parameters == TABLE[name]
    assert all(p.is_meta for p in unet.parameters())
    assert preset.source


def test_every_preset_is_of_a_published_model():
    assert set(PRESETS) == set(TABLE)


def jit_parameters(patch_px: int, depth: int, dim: int, heads: int, bottleneck: int) -> int:
    """Trained parameters of JiT, layer by layer as in its code."""
    head, mlp, pixels = dim // heads, int(int(4 * dim) * 2 / 3), 3 * patch_px**2
    time, labels, context = 256 * dim + dim + dim * dim + dim, (1000 + 1) * dim, 32 * dim
    patches = pixels * bottleneck + bottleneck * dim + dim
    attention = dim * 3 * dim + 3 * dim + 2 * head + dim * dim + dim
    feed_forward = dim * 2 * mlp + 2 * mlp + mlp * dim + dim
    block = 2 * dim + attention + feed_forward + dim * 6 * dim + 6 * dim
    return time + labels + context + patches + depth * block + dim + dim * 2 * dim + 2 * dim + dim * pixels + pixels


@pytest.mark.parametrize(
    ("size", "numbers"),
    {"b": (12, 768, 12, 128), "l": (24, 1024, 16, 128), "h": (32, 1280, 16, 256), "g": (40, 1664, 16, 256)}.items(),
)
@pytest.mark.parametrize("patch_px", [16, 32])
def test_jits_parameters_are_those_of_its_layers(size: str, numbers: tuple[int, int, int, int], patch_px: int):
    assert jit_parameters(patch_px, *numbers) == PRESETS[f"jit_{size}_{patch_px}"].parameters


def test_all_models_but_one_take_the_aspect_ratio_buckets_of_64_px():
    taken = {}
    for name, preset in PRESETS.items():
        size, divisor = preset.config.image_size_px, preset.config.sides_divisor
        shapes = scaled(bucket_shapes(64), 64, size)
        taken[name] = all(side % divisor == 0 for shape in shapes for side in shape)
    assert [name for name, fits in taken.items() if not fits] == ["nostalgebraist_64"]


def test_presets_are_listed_with_plain_integers():
    rows = {str(row["name"]): row for row in list_presets()}
    presets = PRESETS | PRIOR_PRESETS
    assert set(rows) == set(presets)
    for name, row in rows.items():
        assert type(row["parameters"]) is int
        assert row["parameters"] == presets[name].parameters
        kind = "prior" if name in PRIOR_PRESETS else "unet"
        assert (row["kind"], row["family"]) == (kind, presets[name].config.family)
        assert row["summary"]


def test_listing_presets_builds_no_model(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a module was built")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    assert len(list_presets()) == len(PRESETS) + len(PRIOR_PRESETS)


def test_a_preset_can_be_named_in_a_configuration_and_changed():
    adapter: TypeAdapter[object] = TypeAdapter(UNetConfig)
    config = adapter.validate_python({"preset": "500m_res_64", "dropout": 0.25})
    assert config == PRESETS["500m_res_64"].config.model_copy(update={"dropout": 0.25})
    with pytest.raises(ValidationError, match="preset '500m': there is none of this name; choose from 500m_res_64,"):
        adapter.validate_python({"preset": "500m"})


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_survives_json(name: str):
    adapter: TypeAdapter[object] = TypeAdapter(UNetConfig)
    assert adapter.validate_json(PRESETS[name].config.model_dump_json()) == PRESETS[name].config
