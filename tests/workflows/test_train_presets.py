"""Every shipped training configuration loads, and every published model has its published size."""

import json

import pytest

from imagen_core.models.count import count_parameters
from imagen_core.models.presets import PRESETS
from pipeline.config import load_config
from pipeline.presets import find_config, list_presets
from tests.workflows.commands import call
from workflows.sample import Sample, SampleConfig
from workflows.train import Train, TrainWorkflowConfig

SHIPPED = [row["name"] for row in list_presets() if row["workflow"] == "train"]

TABLE = {
    # NeMo Imagen: text 1024 unless t5xxl (4096)
    "500m_res_64": 524_897_540,
    "500m_res_64_t5xxl": 528_052_484,
    "2b_res_64": 2_171_162_116,
    "2b_res_64_cond1024": 2_096_664_068,
    "2b_res_64_cond512": 2_059_415_044,
    "2b_res_64_t5xxl": 2_183_754_244,
    "400m_res_256": 408_350_468,
    "400m_res_256_plain": 408_021_764,
    "400m_res_256_t5xxl": 411_505_412,
    "450m_res_256": 568_675_844,
    "600m_res_256": 646_023_428,
    "600m_res_256_plain": 645_694_724,
    "600m_res_256_stacked": 700_610_308,
    "600m_res_256_t5xxl": 701_119_748,
    "600m_res_1024": 639_193_348,
    "600m_res_1024_plain": 638_864_644,
    "600m_res_1024_t5xxl": 694_289_668,
    "sr256_400m_eff": 429_913_476,
    "sr256_400m_eff_first": 290_417_412,
    "sr1024_400m": 427_285_892,
    "sr1024_400m_first": 287_789_828,
    # guided-diffusion and improved-diffusion
    "adm_64": 295_904_454,
    "adm_256": 553_838_086,
    "adm_256_upsampler": 311_795_910,
    "nostalgebraist_64": 538_707_206,
    # PaddleFleetX, imagen-pytorch, MinImagen
    "paddle_397m": 414_393_508,
    "paddle_2b": 1_625_964_196,
    "paddle_deberta": 816_288_260,
    "paddle_sr256": 730_837_266,
    "paddle_sr256_text": 732_150_418,
    "paddle_sr1024": 720_045_330,
    "paddle_sr1024_text": 721_358_482,
    "imagen_pytorch_base": 1_625_873_188,
    "imagen_pytorch_sr256": 732_069_522,
    "imagen_pytorch_sr1024": 721_277_330,
    "minimagen_base": 1_618_466_051,
    "minimagen_super": 715_760_003,
    "minimagen_base_test": 106_163,
    "minimagen_super_test": 158_147,
}


def test_config_ls_lists_every_published_model_with_its_exact_size() -> None:
    rows = json.loads(call("config", "ls", "--json").out)
    models = {row["name"]: row["parameters"] for row in rows if row["kind"] == "unet"}
    assert models == TABLE
    assert all(type(count) is int for count in models.values())


@pytest.mark.parametrize("name", list(TABLE))
def test_the_model_built_has_the_published_number_of_parameters(name: str) -> None:
    assert count_parameters(PRESETS[name].config) == TABLE[name]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_training_configuration_loads_and_builds(name: str) -> None:
    config = load_config(TrainWorkflowConfig, find_config("train", name))
    assert count_parameters(config.denoiser.unet) > 0
    assert config.training().num_steps == config.num_steps


def test_every_published_run_ships() -> None:
    nemo = ["base64-500m", "base64-500m-edm", "base64-2b", "sr256-400m", "sr256-400m-edm", "sr256-450m-edm"]
    nemo += ["sr256-600m", "sr256-600m-edm", "sr256-600m-edm-noise", "sr1024-600m"]
    paddle = ["397m-single", "397m-dp128", "2b-sharding8-dp32", "deberta-dp8", "sr256-single", "sr256-dp128"]
    paddle += ["sr1024-sharding128"]
    wanted = {f"nemo-{name}" for name in nemo} | {f"paddle-{name}" for name in paddle}
    wanted |= {f"minimagen-{name}" for name in ("base", "super", "base-test", "super-test")}
    assert wanted | {"demo-base", "demo-sr"} == set(SHIPPED)


def test_shipped_sampling_configurations_load() -> None:
    for row in list_presets():
        if row["workflow"] == "sample":
            config = load_config(SampleConfig, find_config("sample", row["name"]))
            assert Sample(config).config.stages


def test_dry_run_of_a_published_model_needs_no_store_and_no_memory() -> None:
    facts = Train(load_config(TrainWorkflowConfig, find_config("train", "nemo-sr1024-600m"))).facts()
    assert facts["parameters"] == TABLE["600m_res_1024"]
    assert facts["store_groups_needed"] == ["images-1024", "images-256", "text-t5"]
    assert facts["store_now"] == "not there yet"
