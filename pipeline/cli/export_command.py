"""`pipeline export`: a model as one file, a cascade for diffusers, or a store for other trainers."""

import json
from collections.abc import Mapping
from typing import Annotated

import typer

from pipeline.cli.config_commands import build, run_and_show
from pipeline.cli.stage_commands import AsJson, show_stage_command
from pipeline.errors import ConfigError

_DIFFUSERS, _ADAPTER = "diffusers", "lora"
_STORE_TARGETS = "mds, webdataset or parquet"


Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH",
        help="Run folder of a training, or a checkpoint; with --to diffusers those of a cascade, smallest images "
        f"first; with --to {_STORE_TARGETS} a store.",
    ),
]
Out = Annotated[
    str, typer.Option(help="The .safetensors file to write; of a cascade or store the folder. A path or a URL.")
]
To = Annotated[
    str | None,
    typer.Option(help=f"Export a cascade, to diffusers; an adapter alone, to lora; or a store, to {_STORE_TARGETS}."),
]
Weights = Annotated[
    str | None, typer.Option(help="`model`, or an average: ema-0.9999, power-0.07. Default: the slowest average.")
]
SamplingConfig = Annotated[
    str | None,
    typer.Option(help="With --to diffusers: configuration of `pipeline run sample` that says how stages sample."),
]
EncoderModel = Annotated[
    str | None, typer.Option(help="With --to diffusers: where the text encoder is; a folder is copied.")
]
LoraBase = Annotated[
    str | None, typer.Option(help="Of an adapter: where the model is that it was trained on, if it was moved.")
]
Sizes = Annotated[
    list[int] | None, typer.Option(help="Of a store: a size of the images; may be repeated. Default: all.")
]
Encoders = Annotated[list[str] | None, typer.Option(help="Of a store: a text encoder; may be repeated. Default: all.")]
Codec = Annotated[
    str | None,
    typer.Option(help="Of a store: png or jpeg. Default: the store's files where the target reads them, else png."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of a store: float16 or float32 embeddings. Default: float16 stays, others become float32. Of DeepFloyd "
        "IF's networks: float32, float16 or bfloat16 weights. Default: float32."
    ),
]


def export(
    paths: Paths,
    out: Out,
    to: To = None,
    weights: Weights = None,
    sampling: SamplingConfig = None,
    encoder_model: EncoderModel = None,
    lora_base: LoraBase = None,
    size: Sizes = None,
    encoder: Encoders = None,
    codec: Codec = None,
    dtype: Dtype = None,
    executor: Annotated[str | None, typer.Option(help="Of a store: local, ray or inline. Default: local.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Of a store: make again what no longer fits, in a folder that has some.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Of a store: no progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a trained model and its configuration as one file, which `checkpoint` and `init_from.path` take, an
    adapter merged into its base; with --to lora the adapter alone; with --to diffusers a cascade as a folder that
    diffusers opens; or the samples of a store as files that other trainers read, where the same command again
    resumes."""
    of_stores = {"--size": size, "--encoder": encoder, "--codec": codec, "--executor": executor}
    of_stores |= {"--restart": restart, "--quiet": quiet}
    of_cascades = {"--sampling": sampling, "--encoder-model": encoder_model}
    if to is not None and to != _ADAPTER:
        _refuse({"--lora-base": lora_base}, "is for exports to one file; export to one first, and then give that file")
    if to == _DIFFUSERS:
        _refuse(of_stores, f"is for exports of a store (--to {_STORE_TARGETS}); leave it out")
        from pipeline.cli.presets import find_config

        settings = None if sampling is None else find_config("sample", sampling, "--sampling")
        options = {"weights": weights, "sampling": settings, "encoder_model": encoder_model, "dtype": dtype}
        show_stage_command("export-diffusers", paths, as_json, out=out, **options)
        return
    if len(paths) > 1:
        raise ConfigError(f"PATH: {paths[1]}: only --to diffusers takes several; export one after the other")
    _refuse(of_cascades, "is for exports of a cascade; add --to diffusers")
    if to is None or to == _ADAPTER:
        _refuse(of_stores | {"--dtype": dtype}, f"is for exports of a store; add --to {_STORE_TARGETS}")
        options = {"weights": weights, "adapter": to == _ADAPTER, "lora_base": lora_base}
        show_stage_command("export", paths[0], as_json, out=out, **options)
        return
    _refuse({"--weights": weights}, "is for exports of a model; leave it out, or --to")
    values = {"sizes_px": size, "encoders": encoder, "codec": codec, "dtype": dtype}
    chosen = {"store": paths[0], "to": to, **{name: value for name, value in values.items() if value}}
    workflow = build("export", None, [f"{name}={json.dumps(value)}" for name, value in chosen.items()])
    from pipeline.options import RunOptions

    run_and_show(workflow, out, RunOptions(executor or "local", restart=restart, quiet=quiet), as_json=as_json)


def _refuse(options: Mapping[str, object], why: str) -> None:
    """ConfigError for the first option that is given."""
    if given := next((name for name, value in options.items() if value), None):
        raise ConfigError(f"{given}: {why}")
