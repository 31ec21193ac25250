"""`pipeline export`: a model as one file, or a store for other trainers."""

import json
from typing import Annotated

import typer

from pipeline.cli.config_commands import build, run_and_show
from pipeline.cli.stage_commands import AsJson, show_stage_command
from pipeline.errors import ConfigError

_ADAPTER = "lora"


def export(
    store_or_training: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Run folder of a training, or a checkpoint; with --to a store."),
    ],
    out: Annotated[str, typer.Option(help="The .safetensors file to write; of a store the folder. A path or a URL.")],
    to: Annotated[
        str | None,
        typer.Option(
            help="Export a store, to mds, webdataset or parquet; PATH is the store. lora: export the adapter alone of "
            "a training of one."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="`model`, or an average such as ema-0.9999. Default: the slowest average.")
    ] = None,
    size: Annotated[
        list[int] | None, typer.Option(help="With --to: a size of the images; may be repeated. Default: all.")
    ] = None,
    encoder: Annotated[
        list[str] | None, typer.Option(help="With --to: a text encoder; may be repeated. Default: all.")
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(help="With --to: png or jpeg. Default: the store's files where the target reads them, else png."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="With --to: float16 or float32 embeddings. Default: float16 stays, others become float32."),
    ] = None,
    executor: Annotated[str | None, typer.Option(help="With --to: local, ray or inline. Default: local.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="With --to: make again what no longer fits, in a folder that has some.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="With --to: no progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a trained model and its configuration as one file, which `checkpoint` and `init_from.path` take; an
    adapter is merged into its base, or with --to lora written alone. With another --to, write the samples of a store
    as files that other trainers read; the same command again resumes that."""
    values = {"sizes_px": size, "encoders": encoder, "codec": codec, "dtype": dtype}
    if to is not None and to != _ADAPTER:
        if weights is not None:
            raise ConfigError("--weights: is for exports of a model; leave it out, or --to")
        chosen = {"store": store_or_training, "to": to, **{name: value for name, value in values.items() if value}}
        workflow = build("export", None, [f"{name}={json.dumps(value)}" for name, value in chosen.items()])
        from pipeline.options import RunOptions

        run_and_show(workflow, out, RunOptions(executor or "local", restart=restart, quiet=quiet), as_json=as_json)
        return
    others = {"--size": size, "--encoder": encoder, "--codec": codec, "--dtype": dtype, "--executor": executor}
    if given := [name for name, value in (others | {"--restart": restart, "--quiet": quiet}).items() if value]:
        raise ConfigError(f"{given[0]}: is for exports of a store; add --to mds, webdataset or parquet")
    show_stage_command("export", store_or_training, as_json, out=out, weights=weights, adapter=to == _ADAPTER)
