"""Every command that README and the pages of docs/how-to show runs, in the order of the pages, on a small dataset."""

import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
import yaml
from PIL import Image, ImageDraw

from imagen_core.store import Store
from pipeline.cli.presets import find_config
from pipeline.config import dump_yaml, load_config
from tests.commands import call
from tests.hub_server import local_hub
from tests.image_server import body, serve, status
from tests.object_store import object_store
from tests.runs import REPOSITORY
from tests.stages.encoders import tiny_models
from tests.test_docs import commands
from tests.workflows.test_recipes import reduced
from workflows.precompute_config import PrecomputeConfig
from workflows.train import TrainWorkflowConfig

ELSEWHERE = {
    "cluster.md": "needs a Ray cluster; tests/pipeline/deploy/test_submit.py has one",
    "add-a-stage.md": "needs an installed stage; tests/stages/precompute/test_make_arrays.py has one",
    "browse.md": "serves until Ctrl-C; tests/stages/browse/test_command.py runs it",
    "duplicates.md": "is of one dataset; tests/stages/duplicates has several",
    "sources.md": "needs a table of scores; tests/workflows/test_where.py has one",
    "deepfloyd-if.md": "needs pipelines of DeepFloyd IF; tests/workflows/test_deepfloyd_if.py runs them on tiny ones",
    "patch-transformer.md": "trains large models; tests/workflows/test_patch_transformer.py has small ones",
    "encoders.md": "needs image encoders; tests/stages/encoders/patches has tiny ones",
    "captioners.md": "needs a server of captions; tests/workflows/test_captioners.py starts one",
    "import.md": "needs checkpoints of other systems; tests/stages/checkpoints writes some",
    "import-caches.md": "needs a cache of another trainer; tests/stages/store_tools/test_verify_given.py writes some",
    "first-model.md": "tests/test_docs.py runs the tutorial",
}
WEIGHTS = ("-c coco-30k", "demo-words", "where=aesthetic", "A/store", "text=[t5, clip]", "--to mds")
WEIGHTS += ("--to diffusers", "condition_images={")
"""Commands that need published weights, a training of hours, scores, other stores, two encoders, stages that fit,
arrays of images, or an optional package; their tests are in tests/stages/evaluation, tests/workflows/test_writing.py,
test_mixture.py and test_text_encoders.py, tests/imagen_core/train/data, tests/stages/exports and
tests/stages/sampling/diffusers."""
RUN_HERE = (
    "train.md",
    "sample.md",
    "precompute.md",
    "planning.md",
    "nightly.md",
    "evaluation.md",
    "scheduling.md",
    "slurm.md",
    "kubernetes.md",
    "skypilot.md",
    "dstack.md",
    "export.md",
)
"""Pages whose commands are run after README's, in this order."""
ROWS = 24
SMALL = ["shard_size=8", "images.sizes_px=[8,32]", "encoders.0.model=tiny-random-t5", "max_drop_fraction=0.9"]
SMALL += ["source.download.allow_private_addresses=true", "source.download.retries=0"]


def page(name: str) -> list[list[str]]:
    folders = (REPOSITORY, REPOSITORY / "docs/how-to", REPOSITORY / "docs/explanation")
    (document,) = (folder / name for folder in folders if (folder / name).is_file())
    return [words for words in commands([document]) if not any(name in " ".join(words) for name in WEIGHTS)]


def small(words: list[str]) -> list[str]:
    """A command with the least settings that make it run here: small models, few steps, this machine's addresses."""
    words = [re.sub(r"^(num_steps|num_images)=\d+$", r"\1=2", word) for word in words if word != "..."]
    words = [re.sub(r"^batch_size=\d+$", "batch_size=2", word).replace("[1024]", "[16]") for word in words]
    kind, workflow = words[1], (*words, "")[2]
    if (kind, workflow) in {("run", "precompute"), ("plan", "precompute")}:
        if "urls-t5-xxl" in words:
            words += [
                setting for setting in SMALL if not any(setting.startswith(w.split("=")[0] + "=") for w in words)
            ]
        words += ["--executor", "inline"]
    elif (kind, workflow) == ("run", "train"):
        words += ["num_steps=1"] if "--dry-run" not in words else []
        if "-c" in words and "--dry-run" not in words:
            recipe = load_config(TrainWorkflowConfig, find_config("train", words[words.index("-c") + 1]))
            words += [f"{key}={value}" for key, value in reduced(recipe).items()]
        elif "--dry-run" not in words:
            words += ["denoiser.unet.embed_dim=32", "denoiser.unet.num_res_blocks=1", "denoiser.unet.head_dim=32"]
    elif (kind, workflow) == ("run", "sample"):
        num_stages = 2 if "one-gpu" in words else 1
        words += ["device=cpu", *(f"stages.{stage}.sampling.num_steps=2" for stage in range(num_stages))]
    elif (kind, workflow) == ("run", "likelihood"):
        words += ["device=cpu"]
    elif (kind, workflow) == ("run", "evaluate"):
        words += ["kernel.subset_size=4", "kernel.num_subsets=2"]
    return words


def run(lines: list[list[str]], change: Callable[[str], str] = lambda word: word) -> None:
    for words in lines:
        arguments = [change(word) for word in small(words)][1:]
        result = call(*arguments)
        assert result.code == 0, f"{' '.join(arguments)}\n{result.out}\n{result.err}"


def image(number: int) -> bytes:
    drawn, data = Image.new("RGB", (80, 72), (250, 250, 250)), io.BytesIO()
    ImageDraw.Draw(drawn).ellipse((8, 4, 50 + number % 9, 60), fill=(200, 9 * number % 255, 40))
    drawn.save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def urls() -> Iterator[list[str]]:
    """URLs of small images; the last one is answered with 503."""
    routes = {f"/{number}.png": body(image(number)) for number in range(ROWS - 1)} | {f"/{ROWS - 1}.png": status(503)}
    with serve(routes) as server:
        yield [server.url(f"/{number}.png") for number in range(ROWS)]


def write_inputs(folder: Path, urls: list[str]) -> None:
    """The files that the commands name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    captions = [f"a disc of kind {number}" for number in range(len(urls))]
    (folder / "data").mkdir()
    for path in (folder / "urls.parquet", folder / "data/urls.parquet"):
        pq.write_table(pa.table({"url": urls, "caption": captions}), path)
    settings = yaml.safe_load((REPOSITORY / "workflows/configs/precompute/urls-t5-xxl.yaml").read_text())
    config = load_config(PrecomputeConfig, settings, ["source.path=urls.parquet", *SMALL])
    (folder / "my.yaml").write_text(dump_yaml(config))
    (folder / "urls.txt").write_text(f"{urls[3]}\n")
    profile = yaml.safe_load((REPOSITORY / "workflows/profiles/h200x8.yaml").read_text())
    (folder / "mine.yaml").write_text(
        yaml.safe_dump(profile | {"num_gpus": 64, "num_cpus": 448, "step_s": 0.4, "checkpoint_s": 20})
    )
    for name in ("A", "B"):
        (folder / name).mkdir()
        for number in range(8):
            (folder / name / f"{number}.png").write_bytes(image(number + 3 * (name == "B")))
            (folder / name / f"{number}.txt").write_text(captions[number])
    tiny_models.write(tiny_models.clip, folder / "CLIP_FOLDER")
    values = np.random.default_rng(0)
    for name in ("a", "b"):
        np.save(folder / f"{name}.npy", values.normal(size=(12, 6)).astype(np.float32))
    np.save(folder / "logits.npy", values.normal(size=(12, 5)).astype(np.float32))


def test_every_page_with_commands_is_run_or_named() -> None:
    pages = {"README.md", "scale.md", *RUN_HERE, "storage.md", "conditions.md", "removal.md", "share.md", *ELSEWHERE}
    shown = {path.name for path in (REPOSITORY / "docs").rglob("*.md") if commands([path])}
    assert shown <= pages, "a page with commands that no test runs"


@pytest.mark.slow
def test_the_commands_shown_run_in_order(tmp_path: Path, urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path, urls)

    def here(word: str) -> str:
        return re.sub(r"^(source\.path=)?/(data|scratch|shared)/", rf"\g<1>{tmp_path}/\2/", word)

    run(page("README.md"), here)
    assert len(Store.open("RUN/store")) == ROWS - 1
    assert Path("RUN/base/checkpoints/step-00000001").is_dir()
    assert Path("images/grid.png").is_file()
    for name in (*RUN_HERE, "scale.md"):
        shutil.rmtree("images", ignore_errors=True)
        run(page(name), here)
    assert Path("RUN/sr256/checkpoints/step-00000001").is_dir()
    assert Store.open("RUN/store").image_sizes == [8, 16, 32]
    assert Path("RUN/report/index.html").is_file()

    sample = Store.open("RUN/store")[5]
    Path("keys.txt").write_text(f"{sample.key}\n")
    Path("hashes.txt").write_text(f"{sample.sha256}\n")
    run(page("removal.md"), lambda word: word.replace("https://example.com/cat.jpg", urls[7]))


@pytest.mark.slow
def test_the_commands_for_the_hub_run(tmp_path: Path, cascade: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(cascade / "run", "RUN")
    shutil.copytree(cascade / "base", "RUN/base")
    with local_hub(tmp_path / "cache") as hub:
        run(page("share.md"))
        assert set(hub.repositories) == {"datasets/USER/scenes", "datasets/USER/table", "models/USER/base"}
        assert hub.repositories["models/USER/base"].private
    assert Path("shared/images-16/00000.png").is_file()
    assert [len(Store.open(name)) for name in ("RUN/store", "SCENES")] == [22, 23]


@pytest.mark.slow
def test_the_commands_for_classes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    Path("imagenet").mkdir()
    with webdataset.TarWriter("imagenet/0.tar") as tar:
        for number in range(8):
            tar.write({"__key__": f"{number:06d}", "jpg": image(number), "cls": str(number)})
    run(page("conditions.md"))
    assert [sample.label for sample in Store.open("RUN/store")] == list(range(8))


@pytest.mark.slow
def test_the_commands_for_object_stores_run(tmp_path: Path, urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path, urls)
    with object_store() as s3:
        from pipeline.storage.open import open_storage

        open_storage(f"{s3.url}/lists").write("laion.parquet", Path("urls.parquet").read_bytes())
        run(page("storage.md"), lambda word: word.replace("s3://bucket", s3.url))
        assert "grid.png" in s3.keys("images/")
