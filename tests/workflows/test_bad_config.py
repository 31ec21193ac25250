"""A wrong command or configuration: one clear error, the right exit code, and nothing written."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.commands import Result, call, call_process, tree

TINY = "model: tiny-random-t5"


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Unusable files in the working directory."""
    texts = {
        "list.yaml": "- shard_size: 3\n",
        "broken.yaml": "source: [\n",
        "unknown.yaml": "shard_size: 8\nimages:\n  size_px: [64]\n",
        "empty.csv": "",
        "header.csv": "url,caption\n",
        "no_caption.csv": "url,text\nhttp://127.0.0.1/x.png,a cat\n",
        "empty.jsonl": "",
        "list.xyz": "http://127.0.0.1/x.png",
        "text.parquet": "not a parquet file",
        "text.tar": "not a tar",
        "empty.tar": "",
        "text.csv.gz": "not compressed",
        "table/captions.tsv": "file\ttext\nx.png\ta cat\n",
        "only_text/readme.md": "nothing here",
        "a_file": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "nothing").mkdir()
    pq.write_table(pa.table({"url": ["u"], "text": ["t"]}), tmp_path / "no_caption.parquet")
    pq.write_table(pa.table({"url": pa.array([], pa.string()), "caption": []}), tmp_path / "empty.parquet")
    pq.write_table(pa.table({"image": [b"x"], "text": ["t"]}), tmp_path / "images.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return call("run", "precompute", "--executor", "inline", "--out", "run", *arguments)


def assert_refused(result: Result, code: int, says: Sequence[str]) -> None:
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("error:") == 1
    for text in says:
        assert text in result.err


WRONG_VALUES = [
    (["shardsize=4"], ["shardsize: unknown key (got 4)", "did you mean 'shard_size'?"]),
    (["images.sizs_px=[64]"], ["images.sizs_px: unknown key (got [64])", "did you mean 'sizes_px'?"]),
    (["encoders.0.max_token=9"], ["encoders.0.max_token: unknown key (got 9)", "did you mean 'max_tokens'?"]),
    (["source.kind=urls", "source.download.timeout=3"], ["source.download.timeout: unknown", "mean 'timeout_s'?"]),
    (["store.zzz=1"], ["store.zzz: unknown key (got 1)", "known keys: dtype, format"]),
    (["-c", "unknown.yaml"], ["images.size_px: unknown key (got [64])", "did you mean 'sizes_px'?"]),
    (["shard_size=many"], ["shard_size: input should be a valid integer", "(got 'many')"]),
    (["images.sizes_px=64"], ["images.sizes_px: input should be a list", "(got 64)"]),
    (["images.sizes_px=[a]"], ["images.sizes_px.0: input should be a valid integer", "(got 'a')"]),
    (["source=images"], ["source: input should be", "(got 'images')"]),
    (["shard_size.rows=3"], ["shard_size: input should be a valid integer", "(got {'rows': 3})"]),
    (["shard_size=0"], ["shard_size: input should be greater than or equal to 1", "(got 0)"]),
    (["max_drop_fraction=1.5"], ["max_drop_fraction: input should be less than or equal to 1", "(got 1.5)"]),
    (["images.sizes_px=[0]"], ["images.sizes_px: give each size once, in pixels", "(got [0])"]),
    (["images.sizes_px=[64, 64]"], ["images.sizes_px: give each size once, in pixels", "(got [64, 64])"]),
    (["execution.num_cpus=0"], ["execution.num_cpus: input should be greater than or equal to 1", "(got 0)"]),
    (["execution.max_in_flight_shards=-1"], ["execution.max_in_flight_shards:", "or equal to 1 (got -1)"]),
    (["execution.max_attempts=0"], ["execution.max_attempts:", "or equal to 1 (got 0)"]),
    (["store.dtype=fp16"], ["store.dtype: input should be 'float16', 'bfloat16', 'float32' or 'int8' (got 'fp16')"]),
    (["source.kind=url"], ["source.kind: there is none of this name (got 'url')", "did you mean 'urls'?"]),
    (["source.kind=kafka"], ["source.kind:", "(got 'kafka')", "synthetic, urls, folder, webdataset, parquet"]),
    (
        [f"encoders=[{{name: a, {TINY}}}, {{name: a, {TINY}}}]"],
        ["encoders: two encoders are named 'a'", "give each its own name"],
    ),
    (["encoders=[{name: a}]"], ["encoders.0.model: needed, but not given", "encoders.0.model=VALUE"]),
    ([f"encoders=[{{name: a/b, {TINY}}}]"], ["encoders.0.name: string should match pattern", "(got 'a/b')"]),
    (["encoders.3.max_tokens=4"], ["override 'encoders.3.max_tokens=4'", "encoders has items 0..0, got '3'"]),
    (["shard_size"], ["override 'shard_size': write KEY=VALUE, for example images.sizes_px='[64, 256]'"]),
    (["=3"], ["override '=3': write KEY=VALUE"]),
    (["a..b=3"], ["override 'a..b=3': write KEY=VALUE"]),
    (["shard_size=[1"], ["override 'shard_size=[1': the value is not valid YAML"]),
    (
        ["-c", "missing.yaml"],
        ["config file missing.yaml: cannot be read (No such file or directory)", "check the path"],
    ),
    (["-c", "missing"], ["--config missing: no such file or shipped configuration", "shipped: demo"]),
    (["-c", "nothing"], ["config file nothing: cannot be read (Is a directory)"]),
    (["-c", "list.yaml"], ["config file list.yaml: must be a mapping of keys, got list"]),
    (["-c", "broken.yaml"], ["config file broken.yaml: not valid YAML", "line 2, column 1"]),
    (["--executor", "slurm"], ["--executor: must be one of ray, local, inline (got 'slurm')"]),
    (["--address", "auto"], ["--address: only the ray executor joins a cluster (got --executor inline)"]),
    (["--executor", "local", "--address", "auto"], ["--address: only the ray", "(got --executor local)"]),
    (["--out", "a_file"], ["--out", "a_file: is not a folder", "choose a folder"]),
]


@pytest.mark.parametrize(("arguments", "says"), WRONG_VALUES, ids=lambda value: " ".join(value)[:40])
def test_a_wrong_value_is_one_error_with_path_value_and_remedy(
    inputs: Path, arguments: list[str], says: list[str]
) -> None:
    before = tree(inputs)
    assert_refused(run(*arguments), 2, says)
    assert tree(inputs) == before


BAD_SOURCES = [
    ("urls", None, ["source.path: needed for source.kind=urls, but not given; set source.path=..."]),
    ("folder", None, ["source.path: needed for source.kind=folder"]),
    ("webdataset", None, ["source.path: needed for source.kind=webdataset"]),
    ("parquet", None, ["source.path: needed for source.kind=parquet"]),
    ("urls", "missing.csv", ["source.path: missing.csv does not exist; check the path"]),
    ("urls", "missing-*.csv", ["source.path: missing-*.csv does not exist"]),
    ("folder", "missing", ["missing is not a folder; check the path"]),
    ("folder", "empty.csv", ["empty.csv is not a folder"]),
    ("webdataset", "data/{0..3}.tar", ["source.path: data/0.tar does not exist"]),
    ("parquet", "missing.parquet", ["source.path: missing.parquet does not exist"]),
    ("urls", "gopher://x/y.csv", ["source.path: gopher://x/y.csv cannot be opened: Protocol not known: gopher"]),
    ("urls", "list.xyz", ["list.xyz: format 'xyz' is not supported; use txt, csv, tsv, jsonl, parquet"]),
    ("urls", "empty.csv", ["empty.csv holds no rows; give a list with at least one row"]),
    ("urls", "header.csv", ["header.csv holds no rows; give a list with at least one row"]),
    ("urls", "empty.jsonl", ["empty.jsonl holds no rows; give a list with at least one row"]),
    ("urls", "empty.parquet", ["empty.parquet holds no rows; give a list with at least one row"]),
    ("urls", "nothing", ["nothing holds no txt, csv, tsv, jsonl, parquet file; check the folder"]),
    ("folder", "nothing", ["nothing holds no images; give a folder with at least one"]),
    ("folder", "only_text", ["only_text holds no images"]),
    ("webdataset", "nothing", ["nothing holds no tar file"]),
    ("parquet", "only_text", ["only_text holds no parquet file"]),
    ("urls", "no_caption.csv", ["source.caption_column:", "has no column 'caption'; it has: url, text"]),
    ("urls", "no_caption.parquet", ["source.caption_column:", "has no column 'caption'; it has: url, text"]),
    ("folder", "table", ["source.caption_column:", "captions.tsv has no column 'caption'; it has: file, text"]),
    ("parquet", "images.parquet", ["source.caption_column:", "has no column 'caption'; it has: image, text"]),
    ("parquet", "no_caption.parquet", ["source.image_column:", "has no column 'image'; it has: url, text"]),
    ("urls", "text.parquet", ["text.parquet is not a readable parquet file"]),
    ("parquet", "text.parquet", ["text.parquet is not a readable parquet file"]),
    ("urls", "text.csv.gz", ["text.csv.gz cannot be read to its end", "write the file again"]),
    ("webdataset", "text.tar", ["text.tar is not a readable tar"]),
    ("webdataset", "empty.tar", ["empty.tar is not a readable tar"]),
]


@pytest.mark.parametrize(("kind", "path", "says"), BAD_SOURCES)
def test_an_unusable_source_is_refused_before_anything_is_written(
    inputs: Path, kind: str, path: str | None, says: list[str]
) -> None:
    before = tree(inputs)
    overrides = [f"source.kind={kind}"] + ([] if path is None else [f"source.path={path}"])
    assert_refused(run(*overrides), 2, says)
    assert tree(inputs) == before


def test_a_list_that_ends_early_is_named(inputs: Path) -> None:
    rows = b"url,caption\n" + b"".join(b"gopher://%d/x.png,a cat\n" % i for i in range(9000))
    (inputs / "cut.csv.gz").write_bytes(gzip.compress(rows)[:-40])
    result = call("plan", "precompute", "source.kind=urls", "source.path=cut.csv.gz")
    assert_refused(result, 2, ["source.path: ", "cut.csv.gz cannot be read to its end", "write the file again"])


def test_an_unknown_workflow_is_refused_with_the_available_ones(inputs: Path) -> None:
    assert_refused(
        call("run", "precomput", "--out", "run"),
        2,
        ["workflow 'precomput': there is none", "choose from evaluate, export, likelihood, precompute"],
    )


def test_two_problems_are_named_at_once(inputs: Path) -> None:
    result = run("shard_size=0", "store.format=zip")
    assert_refused(result, 2, ["shard_size: ", "store.format: "])
    assert len(result.err.splitlines()) == 2


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("./missing", "./missing is not a folder; give a model folder or a hub id"),
        ("/missing/t5", "/missing/t5 is not a folder"),
        ("nothing", "nothing has no config.json; give a folder saved by save_pretrained"),
    ],
)
def test_a_missing_model_is_a_fault_of_the_machine(inputs: Path, model: str, says: str) -> None:
    before = tree(inputs)
    assert_refused(run(f"encoders.0.model={model}"), 4, [f"encoders.model: {says}"])
    assert tree(inputs) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "Missing argument 'workflow'"),
        (["nonsense"], "No such command 'nonsense'"),
        (["run", "precompute", "--nonsense"], "No such option: --nonsense"),
        (["run", "precompute", "--out"], "Option '--out' requires an argument"),
        (["verify"], "Missing argument 'STORE'"),
        (["config", "show"], "Missing argument 'workflow'"),
    ],
)
def test_usage_errors_exit_with_2_too(inputs: Path, arguments: list[str], says: str) -> None:
    before = tree(inputs)
    result = call(*arguments)
    assert (result.code, result.out) == (2, "")
    assert says in result.err
    assert "Traceback" not in result.err
    assert tree(inputs) == before


@pytest.mark.parametrize("command", [["plan"], ["config", "validate"], ["config", "show"]], ids=" ".join)
def test_every_command_that_takes_a_config_refuses_the_same_way(inputs: Path, command: list[str]) -> None:
    assert_refused(call(*command, "precompute", "shardsize=4"), 2, ["shardsize: unknown key", "'shard_size'"])


def test_a_plan_for_a_file_is_refused(inputs: Path) -> None:
    assert_refused(call("plan", "precompute", "--out", "a_file"), 2, ["a_file: is not a folder; choose"])


def test_the_console_script_exits_with_2_and_no_traceback(inputs: Path) -> None:
    before = tree(inputs)
    result = call_process("run", "precompute", "--out", "run", "source.kind=urls", "source.path=no.csv", cwd=inputs)
    assert_refused(result, 2, ["source.path: no.csv does not exist; check the path"])
    assert tree(inputs) == before


def test_a_model_that_is_nowhere_exits_with_4(inputs: Path) -> None:
    result = call("plan", "precompute", "encoders.0.model=nobody/has-this")
    assert_refused(
        result, 4, ["encoders.model: 'nobody/has-this' is neither a local folder", "hf download nobody/has-this"]
    )
