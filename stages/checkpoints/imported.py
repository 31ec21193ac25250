"""What the imports of other systems' models share: a checkpoint per stage, and files to sample and to train with."""

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import yaml

from imagen_core.config import in_one_line
from pipeline.commands import CommandResult
from pipeline.config import local_path
from pipeline.errors import EXIT_OK, ConfigError, MachineError, first_line
from pipeline.storage.files import commit_folder, file_digest, make_folder, unfinished_folder, write_text
from stages.encoders.base import EncoderConfig
from stages.encoders.clip import ClipTextConfig
from stages.encoders.clip_image import ClipImageConfig
from stages.encoders.t5 import T5EncoderConfig
from stages.torch_files import NotTensorsError, read_torch_file

if TYPE_CHECKING:
    from torch import Tensor

    from imagen_core.diffusion import DenoiserConfig, PriorConfig

_SAMPLE = "sample.yaml"
_TEXT_ENCODER = "text_encoder"


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """One stage of a cascade, or a prior.

    Attributes:
        source: the file or folder it was read from.
        config: the denoiser.
        sampling: how to sample from it.
        max_tokens: captions are truncated to this length.
        network: reads the network's tensors by name; ConfigError if they do not fit.
    """

    source: str
    config: "DenoiserConfig | PriorConfig"
    sampling: Mapping[str, Any]
    max_tokens: int
    network: "Callable[[], Mapping[str, Tensor]]"


@dataclass(frozen=True, slots=True)
class ImportedStage(ImportedModel):
    """One stage of a cascade."""

    config: "DenoiserConfig"


@dataclass(frozen=True, slots=True)
class ImportedEncoders:
    """What encoded the captions and images of a model: name, dim, dtype and fingerprint, as of a store's group.

    Attributes:
        text: of captions as tokens; None if no stage reads them.
        embeds: `text_embed`, of captions as one vector each, which a prior reads; and `image_embed`, of images, which
            a prior generates, and decoders read.
    """

    text: Mapping[str, Any] | None
    embeds: Mapping[str, Mapping[str, Any]]


def new_folder(out: str) -> Path:
    """The folder of --out; ConfigError if it holds anything but an import, which `write_stages` compares."""
    target = local_path(out, "--out")
    check_above(target, out)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / _SAMPLE).exists())):
        wrong = "is not empty" if target.is_dir() else "is a file"
        raise ConfigError(f"--out {out}: {wrong}; give a new folder")
    return target


def check_new(target: Path, out: str) -> None:
    """ConfigError if `target` is a file, or a folder with anything in it, or cannot be made."""
    check_above(target, out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--out {out}: {'is not empty' if target.is_dir() else 'is a file'}; give a new folder")


def check_above(target: Path, out: str) -> None:
    """ConfigError if a file is where a folder above `target` would have to be."""
    for above in target.absolute().parents:
        if above.exists() and not above.is_dir():
            raise ConfigError(f"--out {out}: {above} is a file, not a folder; give another place")


def t5_facts(model: str, max_tokens: int, dim: int | None, **reading: object) -> dict[str, Any]:
    """Name, dim, dtype and fingerprint of a text encoder, as of a store's text group.

    Args:
        dim: width of the embeddings that the network reads, if it is known.
        reading: settings of a recipe: how captions become its input, and which rows it keeps.
    Raises:
        ConfigError: the encoder has another width.
        MachineError: it cannot be found.
    """
    settings = {"name": "t5", "model": model, "max_tokens": max_tokens, "compute_dtype": "float32"}
    return _facts(T5EncoderConfig.model_validate({**reading, **settings}), dim)


def clip_encoders(
    model: str, *, max_tokens: int, text_dim: int | None, text_embed_dim: int | None, image_embed_dim: int | None
) -> ImportedEncoders:
    """A CLIP's token states, and its embeddings of captions and of images, of these widths; None for those not read.

    Raises:
        ConfigError: the encoder has another width, or is no CLIP.
        MachineError: it cannot be found.
    """

    def text(name: str, output: Literal["last_hidden_state", "projected"], dim: int) -> dict[str, Any]:
        made = ClipTextConfig(name=name, model=model, max_tokens=max_tokens, output=output, compute_dtype="float32")
        return _facts(made, dim)

    embeds = {}
    if text_embed_dim is not None:
        embeds["text_embed"] = text("clip", "projected", text_embed_dim)
    if image_embed_dim is not None:
        with _finding(), (config := ClipImageConfig(name="clip", model=model, from_px=1)).located() as files:
            config = config.model_copy(update={"from_px": config.preprocessing(files).size_px})
        embeds["image_embed"] = _facts(config, image_embed_dim)
    tokens = None if text_dim is None else text("clip-tokens", "last_hidden_state", text_dim)
    return ImportedEncoders(tokens, embeds)


def _facts(config: EncoderConfig | ClipImageConfig, dim: int | None) -> dict[str, Any]:
    with _finding():
        identity = config.identify()
    if dim not in (None, identity.dim):
        raise ConfigError(f"the network reads {dim}-wide embeddings, but {config.model} is {identity.dim} wide")
    return {"name": config.name, "dim": identity.dim, "dtype": "float32", "fingerprint": identity.fingerprint}


@contextmanager
def _finding() -> Iterator[None]:
    """Adds to the error of an encoder that is not found what may be done."""
    try:
        yield
    except MachineError as error:
        raise MachineError(f"{error}; or say with --encoder-model where it is") from error


@contextmanager
def explained(where: str) -> Iterator[None]:
    """What settings or tensors of another system make of the code that reads them becomes a ConfigError.

    Args:
        where: begins the message: the file, and what is wrong with it.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {in_one_line(error)}") from error


def load_tensors(file: Path | BinaryIO, name: str) -> Any:
    """The content of a file of `torch.save`, if it is only tensors and plain data; no code from the file runs.

    Raises:
        ConfigError: it is something else, or cannot be read.
    """
    try:
        return read_torch_file(file)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({first_line(error)})") from error
    except NotTensorsError as error:
        raise ConfigError(
            f"{name}: cannot be read as tensors: it {error}; download it again, or save its tensors alone"
        ) from error


def write_stages(
    target: Path,
    stages: Sequence[ImportedStage],
    encoder: Mapping[str, Any] | None,
    text_encoder: Sequence[Path] = (),
    *,
    embed_encoders: Mapping[str, Mapping[str, Any]] | None = None,
    prior: ImportedModel | None = None,
) -> CommandResult:
    """Writes `unet-0`, `unet-1` ... and `prior` with a checkpoint and a train.yaml each, and `sample.yaml`; all of it
    or nothing.

    Args:
        encoder: of captions as tokens, `t5_facts`; None if no stage reads them.
        embed_encoders: `ImportedEncoders.embeds`.
        text_encoder: files of the text encoder's model and tokenizer, which become the folder `text_encoder`, as hard
            links where the file system has them; without, the encoder is found by its name.
    Raises:
        ConfigError: the tensors of a stage do not fit, or `target` holds another import; the same one is no error, so
            that a killed import may be started again, whatever it had done.
    """
    encoders = ImportedEncoders(encoder, embed_encoders or {})
    with unfinished_folder(target) as temporary:
        result = _write_stages(temporary, target, stages, encoders, prior)
        link_files(text_encoder, temporary / _TEXT_ENCODER)
        if text_encoder:
            _add_to_sample(temporary, encoder_model=str((target / _TEXT_ENCODER).absolute()))
        if not target.exists() or not any(target.iterdir()):
            commit_folder(temporary, target)
        elif not _same_files(temporary, target):
            raise ConfigError(f"--out {target}: holds another import; give a new folder")
        return result


def _write_stages(
    folder: Path,
    target: Path,
    stages: Sequence[ImportedStage],
    encoders: ImportedEncoders,
    prior: ImportedModel | None,
) -> CommandResult:
    """Writes into `folder` what will be at `target`."""
    named: list[tuple[str, ImportedModel]] = [] if prior is None else [("prior", prior)]
    named += [(f"unet-{index}", stage) for index, stage in enumerate(stages)]
    session, rows = [], []
    for name, stage in named:
        _check_sampling(stage)
        run = target / name
        path = run / _write_checkpoint(folder / run.name, stage, encoders).relative_to(folder / run.name)
        _write_yaml(
            folder / run.name / "train.yaml",
            {
                "denoiser": stage.config.model_dump(mode="json"),
                "init_from": {"path": str(run.absolute())},
                "max_tokens": stage.max_tokens,
            },
        )
        session.append({"checkpoint": str(run.absolute()), "sampling": dict(stage.sampling)})
        number = name if stage is prior else int(name.removeprefix("unet-"))
        rows.append({"stage": number, "weights": stage.source, "checkpoint": str(path)})
    first = {} if prior is None else {"prior": session.pop(0)}
    _write_yaml(folder / _SAMPLE, first | ({"stages": session} if session else {}))
    lines = [f"{row['weights']} -> {row['checkpoint']}" for row in rows]
    more = "" if session else "'stages=[{checkpoint: DECODER}]' "
    if prior is None and "image_embed" in encoders.embeds:
        more = "'prior={checkpoint: PRIOR}' "
    lines.append(
        f"sample: pipeline run sample -c {shlex.quote(f'{target}/sample.yaml')} --out images "
        f"{more}{_images_of(stages, encoders)}"
    )
    name, stage = named[0]
    reads = "".join(f" {field}={record['name']}" for field, record in _read(stage, encoders).items())
    train = shlex.quote(f"{target}/{name}/train.yaml")
    lines.append(f"train on: pipeline run train -c {train} --out trained store=STORE{reads}")
    return {"stages": rows, "sample": str(target / _SAMPLE)}, lines, EXIT_OK


def _check_sampling(model: ImportedModel) -> None:
    """ConfigError if `sample.yaml` would be refused for what the other system's settings say."""
    from imagen_core.cascade_stage import SamplingConfig
    from imagen_core.prior import PriorSamplingConfig

    with explained(f"{model.source}: its settings of sampling cannot be followed here"):
        (PriorSamplingConfig if model.config.kind == "prior" else SamplingConfig).model_validate(model.sampling)


def _images_of(stages: Sequence[ImportedStage], encoders: ImportedEncoders) -> str:
    """The override that says what to sample: captions, or classes for models that read no captions."""
    if encoders.text is not None or encoders.embeds:
        return "'prompts=[...]'"
    return "labels=[...]" if any(stage.config.unet.num_classes for stage in stages) else "'prompts=[\"\"]'"


def link_files(files: Sequence[Path], folder: Path) -> None:
    """Makes a folder of files that lie elsewhere, as hard links, or as copies where there can be none."""
    for file in files:
        make_folder(folder)
        try:
            os.link(file.resolve(), folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)


def _add_to_sample(folder: Path, **settings: str) -> None:
    content = yaml.safe_load((folder / _SAMPLE).read_text(encoding="utf-8"))
    _write_yaml(folder / _SAMPLE, {**content, **settings})


def _same_files(new: Path, old: Path) -> bool:
    """Whether every file of an import is in another folder with the same bytes; runs may have added others."""
    files = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    return all((old / file).is_file() and file_digest(new / file) == file_digest(old / file) for file in files)


def _read(model: ImportedModel, encoders: ImportedEncoders) -> dict[str, Mapping[str, Any]]:
    """The encoders whose embeddings a model is trained on."""
    config = model.config
    reads_images = config.kind == "prior" or config.unet.image_embed_dim is not None
    read = {
        "text": None if config.network.text_dim is None else encoders.text,
        "text_embed": encoders.embeds.get("text_embed") if config.kind == "prior" else None,
        "image_embed": encoders.embeds.get("image_embed") if reads_images else None,
    }
    return {field: record for field, record in read.items() if record is not None}


def _write_checkpoint(run: Path, stage: ImportedModel, encoders: ImportedEncoders) -> Path:
    """Writes into a folder laid out like a training's."""
    from imagen_core.train.checkpoints.checkpoint import write_checkpoint

    state = {"samples": 0, "ema_updates": 0, "loader": None, "config": {"max_tokens": stage.max_tokens}}
    read = _read(stage, encoders)
    state |= {"denoiser": stage.config.model_dump(mode="json"), "encoder": read.pop("text", None)}
    state |= {"embed_encoders": read} if read else {}
    state |= {"imported_from": stage.source}
    tensors = {f"net.{name}": values for name, values in stage.network().items()}
    if bad := next((name for name, values in tensors.items() if not values.isfinite().all()), None):
        raise ConfigError(
            f"{stage.source}: {bad.removeprefix('net.')} (its name here) has values that are not finite; give a "
            "checkpoint from before the training failed, or one in full precision"
        )
    return write_checkpoint(run / "checkpoints", 0, {"model": tensors}, state)


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, yaml.safe_dump(content, sort_keys=False))
