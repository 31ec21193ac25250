"""The commands of the stages, for stores and trained models; the stages are imported when a command runs."""

import inspect as introspection
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

stage_commands = typer.Typer()
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
TakeOver = Annotated[
    bool, typer.Option("--take-over", help="Take over the run folder of a run that is dead but still seems alive.")
]
StoreArg = Annotated[str, typer.Argument(metavar="STORE", help="Store folder or URL, or the run folder around it.")]


@stage_commands.command()
def verify(
    store: StoreArg,
    reencode: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Also encode this fraction of the captions again, at least one; e.g. 0.001."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of captions for --reencode.")] = 0,
    encoder_model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="Path or hub id of an encoder's model, if it has moved."),
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=CONFIG",
            help="For --reencode: what made embeddings that came with the data, as a YAML mapping or a file with one.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check all checksums, the alignment of all rows, and that every input row is accounted for. Names each bad file;
    exits with 1 if there is one."""
    more = {"encoder_models": encoder_model or (), "encoders": encoder or ()}
    show_stage_command("verify", store, as_json, reencode=reencode, seed=seed, **more)


@stage_commands.command()
def inspect(
    store: StoreArg,
    key: Annotated[
        str | None, typer.Option(help="Show the sample with this key, and everything made from it.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Show the samples of this URL.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Show the samples made from the file with this sha256.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the content of a store: samples, groups, bytes, encoder fingerprints; or the details of one sample."""
    show_stage_command("inspect", store, as_json, key=key, url=url, sha256=sha256)


@stage_commands.command()
def remove(
    run_or_store: Annotated[str, typer.Argument(metavar="RUN_OR_STORE", help="Run folder, store folder or URL.")],
    key: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE_OR_VALUE", help="Keys: a file with one per line, or a single key."),
    ] = None,
    url: Annotated[list[str] | None, typer.Option(metavar="FILE_OR_VALUE", help="URLs, in the same way.")] = None,
    sha256: Annotated[
        list[str] | None, typer.Option(metavar="FILE_OR_VALUE", help="sha256 of original files, in the same way.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Reason for the log of removals.")] = "",
    compact: Annotated[
        bool,
        typer.Option("--compact", help="Also erase all removed samples from the files, instead of only hiding them."),
    ] = False,
    grace: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="How long --compact keeps the files that it replaced, for readers on other machines. Default: 120 on "
            "a network file system, 0 elsewhere.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove samples permanently: readers omit them at once, and later runs do not store them again."""
    values = {"key": key or (), "url": url or (), "sha256": sha256 or ()}
    options = {"reason": reason, "compact_files": compact, "grace_s": grace, "dry_run": dry_run}
    show_stage_command("remove", run_or_store, as_json, **values, **options)


@stage_commands.command()
def report(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Run folder, store or training; a folder or URL.")],
    as_json: AsJson = False,
) -> None:
    """Write a self-contained HTML page: of a run its images, captions, drops, sizes and throughput; of a training its
    curves, newest grid and configuration."""
    show_stage_command("report", path, as_json)


@stage_commands.command()
def browse(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH...",
            help="Run folders, stores, trainings, samplings, evaluations, or folders of them. Default: runs.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 means a free one.")] = 0,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. Beyond this machine a token is required, which the printed URL has."),
    ] = "127.0.0.1",
    no_open: Annotated[bool, typer.Option("--no-open", help="Open no browser.")] = False,
) -> None:
    """Show data, runs and trainings in a browser, until Ctrl-C. Changes nothing."""
    show_stage_command("browse", paths or [], False, port=port, host=host, open_browser=not no_open)


@stage_commands.command()
def push(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A store, a run folder, an export of a store, a training, a checkpoint, a .safetensors file of "
            "`pipeline export`, or a folder for diffusers.",
        ),
    ],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="USER/NAME: a dataset for stores and exports, else a model.")
    ],
    revision: Annotated[str | None, typer.Option(help="Branch; made if there is none. Default: main.")] = None,
    license: Annotated[
        str | None,
        typer.Option(help="Licence for the card, as the hub names it: cc-by-4.0 ... Default: that of the card."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    weights: Annotated[
        str | None,
        typer.Option(help="Of a training: `model`, or an average: ema-0.9999, power-0.07. Default: the slowest one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put a store or a model on the Hugging Face hub, with a card. The same command again uploads only what is not
    there. The token is that of `hf auth login`, or of HF_TOKEN."""
    options = {"repo": repo, "revision": revision, "license": license, "private": private, "weights": weights}
    show_stage_command("push", path, as_json, **options)


@stage_commands.command()
def pull(
    repo: Annotated[
        str,
        typer.Argument(metavar="REPO", help="USER/NAME, or datasets/USER/NAME or models/USER/NAME."),
    ],
    out: Annotated[str, typer.Option(help="New folder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: main.")] = None,
    as_json: AsJson = False,
) -> None:
    """Get a store or a model from the Hugging Face hub, and verify it. The same command again resumes."""
    show_stage_command("pull", repo, as_json, out=out, revision=revision)


@stage_commands.command("import")
def import_(
    kind: Annotated[str, typer.Argument(help="Which system's model it is; an unknown KIND lists the available ones.")],
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="The model's folder, or its files.")],
    out: Annotated[str, typer.Option(help="New folder for a checkpoint of each stage, and sample.yaml.")],
    encoder_model: Annotated[
        str | None, typer.Option(help="Where its text encoder is (hub id or folder), if not on the hub by its name.")
    ] = None,
    flags: Annotated[
        list[str] | None,
        typer.Option(
            help="For adm: the flags of a model's command, one --flags for each PATH; or in PATH's .flags file."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make checkpoints of another system's trained model; `pipeline run sample` samples from them."""
    from pipeline.config import local_path
    from pipeline.errors import ConfigError
    from pipeline.workflow import load_import

    for path in paths:
        local_path(path, "PATH")
    function = load_import(kind)
    options: dict[str, object] = {"out": out, "encoder_model": encoder_model}
    if flags:
        if "flags" not in introspection.signature(function).parameters:
            raise ConfigError(f"--flags: models of {kind} have none; leave it out")
        options["flags"] = flags
    _show(function, paths, as_json, **options)


def show_stage_command(name: str, path: str | list[str], as_json: bool, **options: object) -> None:
    """Runs a command that a stage offers through the `pipeline.commands` entry points."""
    from pipeline.workflow import load_command

    _show(load_command(name), path, as_json, **options)


def _show(command: Callable[..., Any], path: str | list[str], as_json: bool, **options: object) -> None:
    """Calls a function that returns a `CommandResult`, prints the result, and exits with its code."""
    from pipeline.storage.disk import disk_errors_explained

    target = options.get("out") or path
    with disk_errors_explained(Path(target if isinstance(target, str) else ".")):
        result, lines, exit_code = command(path, **options)
    if as_json:
        print_json(result)
    else:
        for line in lines:
            typer.echo(line)
    if exit_code:
        raise typer.Exit(exit_code)


def print_json(value: object) -> None:
    """Prints a JSON value, as every command does with --json."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
