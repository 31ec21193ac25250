"""A model sharded over two processes with FSDP2 trains as one process does; its checkpoints fit any other run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from imagen_core.models.layers.noise_embedding import LearnedFourierEmbedding
from imagen_core.models.layers.positions import Rotary
from imagen_core.models.layers.transformer import TransformerLayer
from imagen_core.train import load_checkpoint, train
from imagen_core.train.parallel.wrap import shard
from tests.imagen_core.train.processes import keys_in_order, newest, report, train_split
from tests.imagen_core.train.small import SUPER, TRANSFORMER, make_config, metrics, tensors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ONE: dict[str, dict[str, Any]] = {
    "base": {"num_steps": 4, "grid": {"every_steps": 2, "num_steps": 2, "num_images": 4}},
    "super": {"num_steps": 2, "denoiser": SUPER, "views": {"crop_px": 16, "horizontal_flip": True}},
    "uneven": {"num_steps": 6, "validation": {"num_samples": 7, "every_steps": 3}},
    "split": {"num_steps": 13},
    "offloaded": {"num_steps": 3, "optimizer": {"lr": 1e-3, "on_cpu": True}},
    "transformer": {"num_steps": 3, "denoiser": TRANSFORMER},
}
SHARDED: dict[str, dict[str, Any]] = {
    "base": ONE["base"],
    "super": {**ONE["super"], "micro_batch_size": 3},
    "uneven": {**ONE["uneven"], "micro_batch_size": 1},
    "offloaded": ONE["offloaded"],
    "transformer": {**ONE["transformer"], "micro_batch_size": 2},
}


@pytest.fixture(scope="module")
def one(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for name, changes in ONE.items():
        train(make_config(store, **changes), folder / name)
    return folder


@pytest.fixture(scope="module")
def two(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, sharded over two processes; the one named split is unsharded in one process in the middle."""
    folder = tmp_path_factory.mktemp("two")
    more = {
        "bfloat16": {"num_steps": 2, "precision": "bfloat16", "text": None, "denoiser": WITHOUT_TEXT},
        "lost": {"unreadable": 2, **ONE["uneven"]},
    }
    runs = {name: changes | {"parallel": {"kind": "fsdp2"}} for name, changes in (SHARDED | more).items()}
    train_split(store, folder, runs, parallel={"kind": "fsdp2"})
    return folder


WITHOUT_TEXT = {
    "size_px": 16,
    "unet": {
        "family": "regular",
        "image_size_px": 16,
        "embed_dim": 32,
        "channel_mult": [1],
        "num_res_blocks": 1,
        "attention_type": "self",
        "head_dim": 16,
        "text_dim": None,
    },
}


@pytest.mark.parametrize("name", ["split", *SHARDED])
def test_sharded_training_is_training(one: Path, two: Path, name: str) -> None:
    expected, found = tensors(newest(one / name)), tensors(newest(two / name))
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key].dtype == values.dtype
        torch.testing.assert_close(found[key], values, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("name", ["split", *SHARDED])
def test_metrics_are_those_of_one_process(one: Path, two: Path, name: str) -> None:
    for a, b in zip(metrics(one / name)[-3:], metrics(two / name)[-3:], strict=True):
        for field in {"step", "samples", "loss", "grad_norm", "validation_loss", "validation_loss_without_ema"} & set(
            a
        ):
            assert b[field] == pytest.approx(a[field], rel=1e-9)


def test_grids_of_sharded_training_are_equal(one: Path, two: Path) -> None:
    for name in ("step-00000002.png", "step-00000004.png"):
        assert (two / "base" / "grids" / name).read_bytes() == (one / "base" / "grids" / name).read_bytes()


def test_its_checkpoint_loads_without_processes(one: Path, two: Path) -> None:
    expected, found = (load_checkpoint(folder / "base").denoiser.state_dict() for folder in (one, two))
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


def test_each_sample_is_seen_once_an_epoch_over_two_one_and_two_processes(two: Path) -> None:
    seen = keys_in_order(two, "split")
    assert [len(set(epoch)) for epoch in (seen[:40], seen[40:80], seen[80:])] == [40, 40, 24]


def test_bfloat16_keeps_float32_weights(two: Path) -> None:
    assert {values.dtype for values in tensors(newest(two / "bfloat16")).values()} == {torch.float32}
    assert all(0 < line["loss"] < 10 for line in metrics(two / "bfloat16"))


def test_a_process_that_cannot_read_the_store_ends_all_with_a_checkpoint(two: Path) -> None:
    errors = [report(two, "lost", f"rank-{rank}")["error"] for rank in range(2)]
    assert all("the store is far away; the checkpoint of step 1 is saved" in error for error in errors)
    assert newest(two / "lost").name == "step-00000001"


class Frequencies(nn.Module):
    """Both modules whose parameters are frequencies, next to a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fourier, self.rotary = LearnedFourierEmbedding(8), Rotary(8)
        self.layer = TransformerLayer(16, num_heads=2, head_dim=8, ff_mult=2)

    def forward(self, levels: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.fourier(levels), self.rotary(x), self.layer(x.bfloat16())


def test_frequencies_are_not_rounded_where_weights_are_gathered_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, levels, x = Frequencies(), torch.linspace(-800, 800, 5), torch.randn(1, 300, 16)
    fourier, turned = net.fourier(levels), net.rotary(x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        shard(net, init_device_mesh("cpu", (1,)), torch.bfloat16)
        found = net(levels, x)
        sum(part.float().square().mean() for part in found).backward()
        assert torch.equal(found[0], fourier)
        assert torch.equal(found[1], turned)
        assert found[2].dtype == torch.bfloat16, "the layer's weights were gathered in it"
        gradient = net.fourier.weight.grad
        assert gradient is not None
        assert gradient.abs().max() > 0
    finally:
        dist.destroy_process_group()
