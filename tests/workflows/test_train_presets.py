"""Every shipped training configuration loads, and every published model has its published size."""

import json
import re

import pytest

from imagen_core.diffusion import DenoiserConfig
from pipeline.cli.presets import find_config, list_presets
from pipeline.config import load_config
from tests.commands import call
from tests.imagen_core.models.count import count_parameters
from tests.imagen_core.models.presets.published import TABLE
from workflows.sample import Sample, SampleConfig
from workflows.train import Train, TrainWorkflowConfig

SHIPPED = [row["name"] for row in list_presets() if row["workflow"] == "train"]


def test_config_ls_lists_every_published_model_with_its_exact_size() -> None:
    rows = json.loads(call("config", "ls", "--json").out)
    models = {row["name"]: row["parameters"] for row in rows if row["kind"] == "unet"}
    assert models == TABLE
    assert all(type(count) is int for count in models.values())


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_training_configuration_loads_and_builds(name: str) -> None:
    path = find_config("train", name)
    config = load_config(TrainWorkflowConfig, path)
    parameters = count_parameters(config.denoiser.unet)
    assert parameters > 0
    stated = re.search(r"([\d,]{7,}) parameters", path.read_text(encoding="utf-8").splitlines()[0])
    assert (
        stated is None or int(stated[1].replace(",", "")) == parameters
    )  # NeMo's documents are wrong in three sizes (X7)
    assert config.training().num_steps == config.num_steps


def test_every_published_run_ships() -> None:
    nemo = ["base64-500m", "base64-500m-edm", "base64-2b", "sr256-400m", "sr256-400m-edm", "sr256-450m-edm"]
    nemo += ["sr256-600m", "sr256-600m-edm", "sr256-600m-edm-noise", "sr1024-600m", "base64-500m-online-encoding"]
    paddle = ["397m-single", "397m-dp128", "2b-sharding8-dp32", "deberta-dp8", "sr256-single", "sr256-dp128"]
    paddle += ["sr1024-sharding128"]
    wanted = {f"nemo-{name}" for name in nemo} | {f"paddle-{name}" for name in paddle}
    wanted |= {f"minimagen-{name}" for name in ("base", "super", "base-test", "super-test")}
    ours = {"demo-base", "demo-sr", "demo-words", "one-gpu-base64", "one-gpu-sr256"}
    assert wanted | ours == set(SHIPPED)


@pytest.mark.parametrize(
    ("name", "preset", "objective", "noise"),
    [
        ("base64-500m", "500m_res_64", "edm", False),
        ("base64-500m-edm", "500m_res_64", "edm", False),
        ("base64-500m-online-encoding", "500m_res_64", "eps", False),
        ("base64-2b", "2b_res_64", "edm", False),
        ("sr256-400m", "400m_res_256", "edm", True),
        ("sr256-400m-edm", "400m_res_256_plain", "edm", False),
        ("sr256-450m-edm", "450m_res_256", "edm", False),
        ("sr256-600m", "600m_res_256", "edm", True),
        ("sr256-600m-edm", "600m_res_256_stacked_plain", "edm", False),
        ("sr256-600m-edm-noise", "600m_res_256_stacked", "edm", True),
        ("sr1024-600m", "600m_res_1024", "edm", True),
    ],
)
def test_nemos_runs_have_the_settings_of_its_files(name: str, preset: str, objective: str, noise: bool) -> None:
    denoiser = load_config(TrainWorkflowConfig, find_config("train", f"nemo-{name}")).denoiser
    assert isinstance(denoiser, DenoiserConfig)
    assert count_parameters(denoiser.unet) == TABLE[preset]
    assert (denoiser.diffusion.objective, denoiser.low_res_noise is not None) == (objective, noise)
    assert denoiser.unet.low_res_noise == noise


def test_shipped_sampling_configurations_load() -> None:
    for row in list_presets():
        if row["workflow"] == "sample":
            config = load_config(SampleConfig, find_config("sample", row["name"]))
            assert Sample(config).config.stages


def test_dry_run_of_a_published_model_needs_no_store_and_no_memory() -> None:
    facts = Train(load_config(TrainWorkflowConfig, find_config("train", "nemo-sr1024-600m"))).dry_run()
    assert facts["parameters"] == TABLE["600m_res_1024"]
    assert facts["store_groups_needed"] == ["images-1024", "images-256", "text-t5"]
    assert facts["store_now"] == "not there yet"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one-gpu-base64", "one-gpu-sr256"])
def test_the_cascade_for_one_gpu_takes_half_of_24_gb_and_is_watched(name: str) -> None:
    """The other half is for what the estimate leaves out: workspaces of the kernels, fragmentation, grids."""
    config = load_config(TrainWorkflowConfig, find_config("train", name))
    facts = Train(config).dry_run()
    assert 5e9 < facts["memory_bytes"] < 12e9
    assert 1e8 < facts["parameters"] < 2e8
    assert config.validation.num_samples
    assert config.grid.every_steps
    assert config.denoiser.network.text_dim == 4096


@pytest.mark.parametrize(("num_steps", "highest"), [pytest.param(40, 40e-8, marks=pytest.mark.slow), (20_000, 1e-4)])
def test_dry_run_says_how_high_the_learning_rate_gets(num_steps: int, highest: float) -> None:
    config = load_config(TrainWorkflowConfig, find_config("train", "nemo-base64-500m"), [f"num_steps={num_steps}"])
    assert Train(config).dry_run()["highest_learning_rate"] == pytest.approx(highest)
