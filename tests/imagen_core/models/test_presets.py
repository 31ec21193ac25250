"""Every published model is rebuilt to the last parameter."""

import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from imagen_core.models import UNetConfig
from imagen_core.models.count import build_on_meta, count_parameters
from imagen_core.models.presets import PRESETS, list_presets

TABLE = {
    "500m_res_64": 524_897_540,
    "2b_res_64": 2_171_162_116,
    "2b_res_64_cond1024": 2_096_664_068,
    "2b_res_64_cond512": 2_059_415_044,
    "400m_res_256": 408_350_468,
    "400m_res_256_plain": 408_021_764,
    "450m_res_256": 568_675_844,
    "600m_res_256": 646_023_428,
    "600m_res_256_plain": 645_694_724,
    "600m_res_256_stacked": 700_610_308,
    "600m_res_1024": 639_193_348,
    "600m_res_1024_plain": 638_864_644,
    "sr256_400m_eff": 429_913_476,
    "sr256_400m_eff_first": 290_417_412,
    "sr1024_400m": 427_285_892,
    "sr1024_400m_first": 287_789_828,
    "500m_res_64_t5xxl": 528_052_484,
    "2b_res_64_t5xxl": 2_183_754_244,
    "400m_res_256_t5xxl": 411_505_412,
    "600m_res_256_t5xxl": 701_119_748,
    "600m_res_1024_t5xxl": 694_289_668,
    "adm_64": 295_904_454,
    "adm_256": 553_838_086,
    "adm_256_upsampler": 311_795_910,
    "nostalgebraist_64": 538_707_206,
}
"""Published or instantiated from the published code."""


@pytest.mark.parametrize("name", list(TABLE))
def test_a_published_model_has_its_exact_number_of_parameters(name: str):
    assert PRESETS[name].parameters == TABLE[name]
    assert count_parameters(PRESETS[name].config) == TABLE[name]


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_says_how_many_parameters_it_has_and_where_it_is_from(name: str):
    preset = PRESETS[name]
    unet = build_on_meta(preset.config)
    assert sum(p.numel() for p in unet.parameters()) == preset.parameters
    assert all(p.is_meta for p in unet.parameters())
    assert preset.source


def test_presets_are_listed_with_plain_integers():
    rows = {str(row["name"]): row for row in list_presets()}
    assert set(rows) == set(PRESETS)
    for name, row in rows.items():
        assert type(row["parameters"]) is int
        assert row["parameters"] == PRESETS[name].parameters
        assert (row["kind"], row["family"]) == ("unet", PRESETS[name].config.family)
        assert row["summary"]


def test_listing_builds_no_model():
    code = (
        "import torch.nn as nn\n"
        "def refuse(self, *_, **__): raise AssertionError('a module was built')\n"
        "nn.Module.__init__ = refuse\n"
        "from imagen_core.models.presets import list_presets\n"
        f"assert len(list_presets()) == {len(PRESETS)}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


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
