"""The commands that stages offer, about stores and trained models; the stages are imported when they run."""

import json
from typing import Annotated, Literal

import typer

stage_commands = typer.Typer()
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StoreArg = Annotated[str, typer.Argument(metavar="STORE", help="Store folder or URL, or the run folder around it.")]


@stage_commands.command()
def verify(
    store: StoreArg,
    reencode: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Also encode this fraction of the captions again, at least one; e.g. 0.001."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which captions --reencode takes.")] = 0,
    encoder_model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="Where an encoder's model is now, if not where its name says."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every checksum, every row's place, the fate of every input row. Names each bad file; exit 1 if any."""
    _stage_command("verify", store, as_json, reencode=reencode, seed=seed, encoder_models=encoder_model or ())


@stage_commands.command()
def inspect(
    store: StoreArg,
    key: Annotated[str | None, typer.Option(help="Show the sample with this key, and what was made of it.")] = None,
    url: Annotated[str | None, typer.Option(help="Show the samples of this URL.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Show the samples made from the file with this sha256.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a store holds: samples, groups, bytes, encoder fingerprints; or all about one sample."""
    _stage_command("inspect", store, as_json, key=key, url=url, sha256=sha256)


@stage_commands.command()
def remove(
    run_or_store: Annotated[str, typer.Argument(metavar="RUN_OR_STORE", help="Run folder, store folder or URL.")],
    key: Annotated[
        list[str] | None, typer.Option(metavar="FILE_OR_VALUE", help="Keys: a file, one a line; or a key.")
    ] = None,
    url: Annotated[list[str] | None, typer.Option(metavar="FILE_OR_VALUE", help="URLs, likewise.")] = None,
    sha256: Annotated[
        list[str] | None, typer.Option(metavar="FILE_OR_VALUE", help="sha256 of original files, likewise.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Goes into the log of removals.")] = "",
    compact: Annotated[
        bool, typer.Option("--compact", help="Also erase all removed samples from the files, not only from view.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove samples, for good: readers leave them out at once, and later runs do not store them again."""
    values = {"key": key or (), "url": url or (), "sha256": sha256 or ()}
    _stage_command("remove", run_or_store, as_json, **values, reason=reason, compact_files=compact, dry_run=dry_run)


@stage_commands.command()
def report(
    run_or_store: Annotated[str, typer.Argument(metavar="RUN_OR_STORE")],
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page about a run: images, captions, drops, sizes, throughput."""
    _stage_command("report", run_or_store, as_json)


@stage_commands.command("import")
def import_(
    kind: Annotated[Literal["minimagen", "nemo"], typer.Argument(help="Whose model it is.")],
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="MinImagen: the training directory. NeMo: a .nemo or .ckpt a stage."),
    ],
    out: Annotated[str, typer.Option(help="New folder for a checkpoint of each stage, and sample.yaml.")],
    encoder_model: Annotated[
        str | None, typer.Option(help="Where its text encoder is (hub id or folder), if not on the hub by its name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make checkpoints of another system's trained model; `pipeline run sample` draws with them."""
    _stage_command(f"import-{kind}", paths, as_json, out=out, encoder_model=encoder_model)


@stage_commands.command()
def export(
    training: Annotated[str, typer.Argument(metavar="RUN", help="Run folder of a training, or a checkpoint.")],
    out: Annotated[str, typer.Option(help="New .safetensors file.")],
    weights: Annotated[
        str | None, typer.Option(help="`model`, or an average such as ema-0.9999; the slowest average if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a trained model and its configuration as one file; `checkpoint` and `init_from.path` take it."""
    _stage_command("export", training, as_json, out=out, weights=weights)


def _stage_command(name: str, path: str | list[str], as_json: bool, **options: object) -> None:
    """Runs a command that a stage offers through the `pipeline.commands` entry points.

    It returns (JSON-able result, lines for people, exit code).
    """
    from pipeline.workflow import load_command

    result, lines, exit_code = load_command(name)(path, **options)
    if as_json:
        print_json(result)
    else:
        for line in lines:
            typer.echo(line)
    if exit_code:
        raise typer.Exit(exit_code)


def print_json(value: object) -> None:
    """As every command prints it with --json."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
