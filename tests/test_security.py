"""Untrusted files run no code, and the table in docs/explanation/security.md names tests that exist."""

import ast
import io
import json
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.commands import call
from tests.images import plain_png
from tests.named_tests import missing_tests, named_tests
from tests.runs import REPOSITORY
from tests.stages.encoders import tiny_models

PACKAGES = ("pipeline", "stages", "imagen_core", "workflows")
RUNS_CODE = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
CALLS = {
    "eval",
    "exec",
    "torch.load",
    "np.load",
    "numpy.load",
    "os.system",
    "yaml.load",
    "yaml.unsafe_load",
    "compile",
}


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_no_package_imports_a_module_or_calls_a_function_that_runs_what_it_reads() -> None:
    found = []
    for path in (p for package in PACKAGES for p in (REPOSITORY / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [
                    alias.name.partition(".")[0] for alias in node.names if alias.name.partition(".")[0] in RUNS_CODE
                ]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in RUNS_CODE:
                names = [alias.name for alias in node.names if not alias.name.endswith("Error")]
            elif isinstance(node, ast.Call):
                names = [name for name in [ast.unparse(node.func)] if name in CALLS and not _tensors_only(node)]
                names += [k.arg for k in node.keywords if k.arg == "shell" and ast.unparse(k.value) == "True"]
                names += [
                    k.arg for k in node.keywords if k.arg == "trust_remote_code" and ast.unparse(k.value) != "False"
                ]
            found += [f"{path.relative_to(REPOSITORY)}:{node.lineno}: {name}" for name in names]
    assert not found


def _tensors_only(call: ast.Call) -> bool:
    """Whether a call of torch.load explicitly builds nothing but tensors."""
    return any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_models.t5(tmp_path / "model")
    return tmp_path / "model"


def encode_with(model: Path, tmp_path: Path):
    encoder = f"encoders=[{{name: t5, kind: t5, model: {model}}}]"
    small = ("source.num_samples=4", "images.sizes_px=[16]", encoder)
    return call("run", "precompute", "--out", str(tmp_path / "run"), "--executor", "inline", "--quiet", *small)


def test_a_checkpoint_that_is_a_pickle_with_code_in_it_is_refused_and_runs_nothing(
    model: Path, tmp_path: Path
) -> None:
    proof = tmp_path / "it-ran"
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    torch.save({"shared.weight": Payload(proof)}, model / "pytorch_model.bin")
    result = encode_with(model, tmp_path)
    assert result.code == 4
    assert "encoders.model" in result.err
    assert not proof.exists()


def test_code_beside_a_model_is_not_run(model: Path, tmp_path: Path) -> None:
    proof = tmp_path / "it-ran"
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForTextEncoding": "evil.Model"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(proof)!r}, 'w')\n")
    encode_with(model, tmp_path)
    assert not proof.exists()


def test_a_store_with_a_pickled_type_in_it_runs_nothing(tmp_path: Path) -> None:
    proof = tmp_path / "it-ran"
    out = tmp_path / "run"
    small = ("source.num_samples=4", "images.sizes_px=[16]", "encoders=[]")
    assert call("run", "precompute", "--out", str(out), "--executor", "inline", "--quiet", *small).code == 0
    (path,) = (out / "store" / "samples").glob("*.parquet")
    table = pq.read_table(path)
    evil = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Payload(proof)),
    }
    fields = [field.with_metadata(evil) for field in table.schema]
    pq.write_table(table.cast(pa.schema(fields, table.schema.metadata)), path)
    for command in ("verify", "inspect", "report"):
        call(command, str(out))
    assert not proof.exists()


def test_a_caption_is_text_in_the_report(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(plain_png())
    (images / "a.txt").write_text("<script>alert(1)</script>")
    source = f"source={{kind: folder, path: {images}}}"
    small = ("--executor", "inline", "--quiet", source, "images.sizes_px=[16]", "encoders=[]")
    assert call("run", "precompute", "--out", str(tmp_path / "run"), *small).code == 0
    assert call("report", str(tmp_path / "run")).code == 0
    page = (tmp_path / "run" / "report" / "index.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page


def test_a_pickle_in_a_tar_or_a_wdinfo_runs_nothing(tmp_path: Path) -> None:
    proof, tar = tmp_path / "it-ran", tmp_path / "0.tar"
    evil = pickle.dumps({"t5": {"encodings": Payload(proof)}, "tar_files": Payload(proof)})
    with tarfile.open(tar, "w") as archive:
        for name, data in (("0.png", plain_png()), ("0.txt", b"a"), ("0.pickle", evil)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (tmp_path / "wdinfo.pkl").write_bytes(evil)
    small = ("--executor", "inline", "--quiet", "images.sizes_px=[16]", "source.kind=webdataset")
    arrays = "source.arrays={t5: {member: pickle, pickle_key: t5}}"
    given = "encoders=[{name: t5, kind: given, array: t5, model: x, dim: 2}]"
    for source in ((f"source.path={tar}",), (f"source.path={tmp_path}", f"source.file_list={tmp_path}/wdinfo.pkl")):
        result = call("run", "precompute", "--out", str(tmp_path / "run"), *small, *source, arrays, given)
        assert result.code == 2
        assert "the pickle has pathlib" in result.err
        assert "Traceback" not in result.err
    assert not proof.exists()


def test_the_proof_is_touched_by_who_unpickles(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "it-ran")))
    assert (tmp_path / "it-ran").exists()


def test_every_test_named_in_the_security_table_exists() -> None:
    text = (REPOSITORY / "docs" / "explanation" / "security.md").read_text(encoding="utf-8")
    assert not missing_tests(text)
    assert sum(bool(test) for _, test in named_tests(text)) > 40
