"""Another package adds a source, an encoder, a filter, a sampler, an import and a workflow, and all of them run."""

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from imagen_core import extensions
from imagen_core.store import Store, verify_store
from imagen_core.train import load_checkpoint
from pipeline.errors import ConfigError
from stages.encoders.batches.tokens import load_tokenizer, tokenize
from stages.encoders.prompts import encode_prompts
from stages.encoders.recipes.settings import RecipeSettings
from stages.encoders.registry import AnyEncoder, AnyImageEmbedding
from stages.encoders.t5 import T5EncoderConfig
from stages.encoders.tiny import TINY_MODEL, write_tiny_model
from tests.added_packages import PACKAGE, on_path
from tests.commands import call, drops, precompute, summary
from tests.images import plain_png
from tests.network import guarded
from tests.runs import REPOSITORY
from tests.trained import BASE, train

SCALE = 0.5
GROUPS = ("sources", "caches", "encoders", "captioners", "filters", "stages", "samplers", "imports", "workflows")
ENCODER = f"{{name: words, kind: word_vectors, model: {TINY_MODEL}, scale: {SCALE}, compute_dtype: float32}}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the package is installed into, as its wheel says; on the path of this process."""
    work = tmp_path_factory.mktemp("extension")
    source, target = work / "source", work / "site"
    copytree(PACKAGE, source, ignore=lambda *_: ["__pycache__"])
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(work)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = work.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    with on_path(target):
        yield target


@pytest.fixture(scope="module")
def run_folder(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A precompute run with the package's source, encoder and filter."""
    out = tmp_path_factory.mktemp("precompute") / "run"
    result = precompute(
        out,
        "source={kind: solid, num_samples: 6}",
        "images.sizes_px=[16]",
        "filters=[{kind: max_words, max: 4}]",
        f"encoders=[{ENCODER}]",
        "store.dtype=float32",
        "max_drop_fraction=0.9",
    )
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="module")
def trained(run_folder: Path) -> Path:
    """A base model of 16 px, trained for two steps on that store."""
    config = {
        **BASE,
        "store": str(run_folder / "store"),
        "text": "words",
        "num_steps": 2,
        "checkpoints": {"every_steps": 2},
    }
    (run_folder.parent / "base.yaml").write_text(yaml.safe_dump(config))
    result = train(run_folder.parent, "base", run_folder.parent / "base")
    assert result.code == 0, result.err
    return run_folder.parent / "base"


def sampled(out: Path, checkpoint: Path, *more: str, **sampler: object) -> np.ndarray:
    """uint8 pixels of one image that is sampled in three steps."""
    from PIL import Image

    stage = {"checkpoint": str(checkpoint), "sampling": {"sampler": sampler, "num_steps": 3}}
    result = call(
        *["run", "sample", "--out", str(out), "--quiet", "device=cpu"],
        *[f"stages=[{json.dumps(stage)}]", "prompts=[a green image]", *more],
    )
    assert result.code == 0, result.err
    return np.asarray(Image.open(out / "images-16/00000.png"))


def expected_embeddings(captions: list[str], tmp_path: Path) -> list[np.ndarray]:
    """Rows of the tiny T5's embedding table, scaled."""
    write_tiny_model(tmp_path / TINY_MODEL)
    table = load_file(tmp_path / TINY_MODEL / "model.safetensors")["shared.weight"].numpy()
    with T5EncoderConfig(name="t5", model=str(tmp_path / TINY_MODEL)).located() as files:
        ids, _ = tokenize(load_tokenizer(files), captions, 128)
    return [table[tokens] * np.float32(SCALE) for tokens in ids]


def test_a_text_cache_of_an_added_kind_becomes_a_group_without_its_padding(installed: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    for number, padded in enumerate([np.concatenate([rows, np.full((3, 4), -1, np.float32)]), np.full((2, 4), -1.0)]):
        (images / f"{number}.txt").write_text(f"image {number}")
        (images / f"{number}.png").write_bytes(plain_png())
        np.save(images / f"{number}.npy", padded)
    source = f"{{kind: folder, path: {images}, arrays: {{t5: {{kind: plain_npy}}}}}}"
    encoder = "{name: t5, kind: given, array: t5, model: other, dim: 4}"
    settings = (f"source={source}", f"encoders=[{encoder}]", "images.sizes_px=[16]", "store.dtype=float32")
    result = precompute(tmp_path / "run", *settings)
    assert result.code == 0, result.err
    assert [one.text["t5"][0].tolist() for one in Store.open(tmp_path / "run" / "store")] == [rows.tolist()]
    assert summary(tmp_path / "run")["tally"]["groups"]["text-t5"]["drops"] == {"missing_embedding": 1}


def test_rows_of_an_added_source_that_an_added_filter_rejects_are_drops_with_its_reason(run_folder: Path) -> None:
    assert drops(run_folder) == [("solid-2", "too_many_words"), ("solid-5", "too_many_words")]
    assert summary(run_folder)["tally"]["groups"]["samples"]["drops"] == {"too_many_words": 2}
    store = Store.open(run_folder / "store")
    assert [sample.key for sample in store] == ["solid-0", "solid-1", "solid-3", "solid-4"]
    assert [sample.images[16][0, 0].tolist() for sample in store][:2] == [[255, 0, 0], [0, 255, 0]]
    assert verify_store(run_folder / "store").ok


def test_an_added_captioner_makes_a_set_of_captions(installed: Path, tmp_path: Path) -> None:
    captioner = "{name: colors, kind: color_names, prompt: 'It is {caption},', names: [r, g, b]}"
    small = ("source={kind: solid, num_samples: 3}", "images.sizes_px=[16]", "encoders=[]")
    result = precompute(tmp_path / "run", *small, f"captioners=[{captioner}]")
    assert result.code == 0, result.err
    store = Store.open(tmp_path / "run" / "store")
    found = {sample.captions[0]: sample.caption_sets["colors"] for sample in store}
    assert found == {caption: [f"It is {caption}, {name}"] for caption, name in zip(found, "rgb", strict=True)}
    assert store.manifest.captions["colors"].made_by["names"] == ["r", "g", "b"]


def test_an_added_filter_is_in_the_fingerprint_of_the_samples(run_folder: Path) -> None:
    manifest = json.loads((run_folder / "store/manifest.json").read_text())
    config = manifest["groups"]["samples"]
    assert config["filters"] == [{"kind": "max_words", "max": 4}]
    assert (config["max_pixels"], config["too_small"]) == (100_000_000, "drop")


def test_the_embeddings_of_an_added_encoder_are_stored(run_folder: Path, tmp_path: Path) -> None:
    store = Store.open(run_folder / "store")
    expected = expected_embeddings(["red", "a green image"], tmp_path)
    for sample, embedding in zip([store[0], store[1]], expected, strict=True):
        np.testing.assert_array_equal(sample.text["words"][0], embedding)
    group = store.manifest.texts["words"]
    assert (group.dim, group.fingerprint["kind"], group.fingerprint["scale"]) == (64, "word_vectors", SCALE)


def test_the_setting_of_an_added_encoder_survives_into_the_encoding_of_prompts(trained: Path, tmp_path: Path) -> None:
    encoder = load_checkpoint(trained).encoder
    assert encoder is not None
    (found,) = encode_prompts(["a blue circle"], encoder, use_gpu=False)
    (expected,) = expected_embeddings(["a blue circle"], tmp_path)
    np.testing.assert_array_equal(found, expected)


def test_an_added_sampler_samples_what_its_formula_says(trained: Path, tmp_path: Path) -> None:
    euler = sampled(tmp_path / "euler", trained, kind="euler")
    relaxed = sampled(tmp_path / "relaxed", trained, kind="relaxed_euler")
    half = sampled(tmp_path / "half", trained, kind="relaxed_euler", relaxation=0.5)
    np.testing.assert_array_equal(relaxed, euler)
    assert not np.array_equal(half, euler)
    record = yaml.safe_load((tmp_path / "half/config.yaml").read_text())
    assert record["stages"][0]["sampling"]["sampler"] == {"kind": "relaxed_euler", "relaxation": 0.5}


def test_an_added_import_makes_a_checkpoint_that_samples(trained: Path, tmp_path: Path) -> None:
    original = load_checkpoint(trained, weights="model")
    tensors = {name.removeprefix("net."): value for name, value in original.denoiser.state_dict().items()}
    model = tmp_path / "model"
    model.mkdir()
    (model / "denoiser.json").write_text(json.dumps(original.denoiser.config.model_dump(mode="json")))
    save_file({name: value.contiguous() for name, value in tensors.items()}, model / "weights.safetensors")
    result = call("import", "plain", str(model), "--out", str(tmp_path / "run"), "--encoder-model", TINY_MODEL)
    assert result.code == 0, result.err
    imported = load_checkpoint(tmp_path / "run/unet-0", weights="model").denoiser.state_dict()
    assert all(torch.equal(imported[name], value) for name, value in original.denoiser.state_dict().items())
    command = ["run", "sample", "-c", str(tmp_path / "run/sample.yaml"), "--out", str(tmp_path / "images"), "--quiet"]
    result = call(*command, "prompts=[red]", "device=cpu", f"encoder_model={TINY_MODEL}")
    assert result.code == 0, result.err
    assert (tmp_path / "images/images-16/00000.png").is_file()


def test_an_added_workflow_runs(run_folder: Path, tmp_path: Path) -> None:
    result = call("run", "word-counts", "--out", str(tmp_path), "--quiet", f"store={run_folder / 'store'}")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "words.json").read_text()) == {"red": 2, "a": 2, "green": 2, "image": 2}
    assert summary(tmp_path)["summary"] == {"words": 8, "distinct_words": 4}


def test_the_schema_lists_the_kinds_of_installed_packages(installed: Path) -> None:
    properties = json.loads(call("config", "schema", "precompute").out)["properties"]
    choices = {
        "source": properties["source"]["oneOf"],
        **{name: properties[name]["items"]["oneOf"] for name in ("encoders", "captioners", "filters", "stages")},
    }
    added = {name: choice[-1] for name, choice in choices.items()}
    kinds = {name: choice["properties"]["kind"]["const"] for name, choice in added.items()}
    assert kinds == {
        "source": "solid",
        "encoders": "word_vectors",
        "captioners": "color_names",
        "filters": "max_words",
        "stages": "bright_pixels",
    }
    assert added["source"]["properties"]["num_samples"]["description"] == "Number of images."
    assert {"$ref": "#/$defs/FolderConfig"} in choices["source"]


def test_a_wrong_value_of_an_added_kind_is_refused_with_its_path(installed: Path) -> None:
    result = call("config", "validate", "precompute", "source={kind: solid, num_samples: many, size: 3}")
    assert result.code == 2
    assert "source.num_samples: input should be a valid integer" in result.err
    assert "source.size: unknown key (got 3); remove it" in result.err


def test_an_unknown_kind_lists_the_built_in_and_the_added_ones(installed: Path) -> None:
    result = call("config", "validate", "precompute", "source.kind=nonesuch")
    assert "source.kind: there is none of this name (got 'nonesuch'); choose from synthetic, " in result.err
    assert result.err.rstrip().endswith(", solid")
    result = call("import", "nonesuch", "x", "--out", "y")
    assert result.code == 2
    words, _, choices = result.err.strip().rpartition("; choose from ")
    assert words == "error: import 'nonesuch': there is none of this name"
    assert choices.split(", ") == sorted(choices.split(", "))
    assert {"diffusers", "minimagen", "nemo", "plain"} <= set(choices.split(", "))


def test_help_stays_light_with_a_package_installed(installed: Path) -> None:
    script = (
        "import contextlib, sys\n"
        "from pipeline.cli.main import app\n"
        "with contextlib.suppress(SystemExit):\n"
        "    app(['--help'])\n"
        "assert not {'torch', 'pydantic', 'extension_example'} & sys.modules.keys(), sorted(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**guarded(installed, REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


# ---- broken and clashing packages ----


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Path]:
    """A second installed package, `other` 2.0, whose entry points are broken or clash with built-in ones."""
    info = tmp_path / "site" / "other-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(
        "[pipeline.sources]\nlost = nonesuch.module:Config\nfolder = other:Config\n"
        "[pipeline.filters]\nnumber = math:pi\n"
        "[pipeline.captioners]\nno_model = stages.captioners.base:CaptionerConfig\n"
        "[pipeline.workflows]\nlost = nonesuch.module:Workflow\ntrain = other:Train\n"
        "[pipeline.imports]\nlost = nonesuch.module:load\n"
    )
    with on_path(tmp_path / "site"):
        yield tmp_path


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "source.kind=lost",
            "source: kind 'lost' of package other 2.0 (entry point `lost = nonesuch.module:Config` in "
            "pipeline.sources) cannot be loaded (ModuleNotFoundError: No module named 'nonesuch'); repair or "
            "uninstall the package",
        ),
        (
            "source.kind=folder",
            "source: kind 'folder' is defined by this toolkit and by package other 2.0 (entry point `folder = "
            "other:Config` in pipeline.sources); uninstall one of the packages",
        ),
        (
            "filters=[{kind: number}]",
            "must be a stages.filters.base.Filter with `kind: Literal['number']` (got 3.14",
        ),
        (
            "captioners=[{kind: no_model, name: a}]",
            "kind 'no_model' of package other 2.0 (entry point `no_model = stages.captioners.base:CaptionerConfig` in "
            "pipeline.captioners) must be a stages.captioners.base.ModelCaptionerConfig with",
        ),
    ],
)
def test_a_broken_or_clashing_kind_is_refused_with_package_entry_point_and_remedy(
    other: Path, override: str, says: str
) -> None:
    result = call("config", "validate", "precompute", override)
    assert result.code == 2
    assert says in result.err


def test_a_broken_package_disturbs_only_those_who_use_it(other: Path) -> None:
    assert call("config", "validate", "precompute", "source.kind=synthetic").code == 0
    schema = json.loads(call("config", "schema", "precompute").out)
    assert "cannot be loaded" in next(
        choice["description"]
        for choice in schema["properties"]["source"]["oneOf"]
        if choice.get("properties") == {"kind": {"const": "lost"}}
    )


def test_a_broken_workflow_or_import_and_two_of_one_name_are_refused(other: Path) -> None:
    broken = call("config", "show", "lost")
    assert broken.code == 2
    assert "workflow 'lost' of package other 2.0 (entry point `lost = nonesuch.module:Workflow`" in broken.err
    assert "cannot be loaded (ModuleNotFoundError: No module named 'nonesuch'); repair or uninstall" in broken.err
    assert "import 'lost' of package other 2.0" in call("import", "lost", "x", "--out", "y").err
    clash = call("config", "show", "train")
    assert clash.code == 2
    assert "workflow 'train' is defined by package" in clash.err
    assert "(entry point `train = other:Train` in pipeline.workflows)" in clash.err
    assert clash.err.rstrip().endswith("uninstall one of the packages")


def test_a_checkpoint_whose_encoder_is_not_installed_says_so() -> None:
    made_by = {"name": "words", "dim": 64, "dtype": "float32", "fingerprint": {"kind": "vectors"}}
    with pytest.raises(ConfigError, match="encoder words: kind 'vectors': no installed package defines it"):
        encode_prompts(["red"], made_by, use_gpu=False)


# ---- built-in ones ----


def test_the_fingerprints_of_the_built_in_text_encoders_have_these_settings() -> None:
    fingerprint = T5EncoderConfig(name="t5", model=TINY_MODEL, max_tokens=9).identify().fingerprint
    hashes = {name: fingerprint[name] for name in ("weights_sha256", "tokenizer_sha256")}
    settings = {name: fingerprint[name] for name in ("model_config", "tokenizer")}
    assert fingerprint == {
        "model": "tiny-random-t5",
        "revision": None,
        "kind": "t5",
        "compute_dtype": "bfloat16",
        "output": "last_hidden_state",
        "max_tokens": 9,
        "text_normalisation": "control characters to spaces, strip",
        **hashes,
        **settings,
    }
    assert all(re.fullmatch(r"[0-9a-f]{64}", str(value)) for value in hashes.values())


def test_the_fields_that_decide_the_embeddings_of_built_in_kinds_are_those_of_existing_stores() -> None:
    text = {"compute_dtype", "output", "max_tokens"}
    for kind in ("t5", "clip", "auto"):
        fields = extensions.member_of(AnyEncoder, kind).embedding_fields()
        assert fields - (RecipeSettings.model_fields.keys() - text) == text, kind  # these count where they are set
    image = {"compute_dtype", "output", "from_px"}
    assert extensions.member_of(AnyImageEmbedding, "clip").embedding_fields() == image


def test_the_groups_of_entry_points_are_those_that_the_guide_names() -> None:
    guide = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
    for group in (*GROUPS, "image_encoders"):
        assert f"`pipeline.{group}`" in guide, group
    assert {entry.name for entry in entry_points(group="pipeline.imports")} >= {"minimagen", "nemo"}


def test_the_guide_quotes_the_package_as_it_is() -> None:
    pages = ("CONTRIBUTING.md", "docs/how-to/add-a-stage.md")
    guide = "".join((REPOSITORY / page).read_text("utf-8") for page in pages)
    quoted = re.findall(r"`tests/extension_package/([\w./]+)`:\n\n```\w+\n(.*?)```\n", guide, re.DOTALL)
    assert len(quoted) == len(GROUPS) + 1
    for name, text in quoted:
        assert text == (PACKAGE / name).read_text("utf-8"), name
