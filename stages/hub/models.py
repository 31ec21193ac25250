"""A trained model, as it is pushed: one file with weights and configuration, or a diffusers folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imagen_core.train import CheckpointError
from imagen_core.train.checkpoints.single_file import write_model
from pipeline.config import local_path
from pipeline.errors import ConfigError
from pipeline.storage.files import file_digest
from pipeline.storage.scratch import scratch
from stages.checkpoints.load import load_checkpoint_from
from stages.hub.cards import diffusers_card, model_card
from stages.hub.package import CARD, DIFFUSERS, MODEL, Item, Package


def model_package(place: str, weights: str | None) -> Package:
    """The model of a training, a checkpoint, or a file of `pipeline export`: as the latter, without the optimizer.

    Args:
        weights: `model`, or one of the averages; None means the slowest average.
    Raises:
        ConfigError: there is no such checkpoint, it is damaged, or has no such weights.
    """
    try:
        model = load_checkpoint_from(place, weights)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    path = scratch() / MODEL.head
    write_model(path, model)
    item = Item(MODEL.head, path.stat().st_size, file_digest(path))

    @contextmanager
    def open_item(_: Item) -> Iterator[Path]:
        yield path

    return Package(MODEL, [item], open_item, lambda repo, license: model_card(model, item, repo, license))


def diffusers_package(place: str) -> Package:
    """A folder that diffusers opens, such as `pipeline export --to diffusers` writes.

    Raises:
        ConfigError: it is a URL, or its model_index.json is damaged.
    """
    folder = local_path(place, "PATH")
    try:
        index = json.loads((folder / DIFFUSERS.head).read_bytes())
        card = (folder / CARD).read_text("utf-8") if (folder / CARD).exists() else ""
    except ValueError as error:
        raise ConfigError(
            f"{place}: {DIFFUSERS.head} or {CARD} is damaged ({error}); export the model again"
        ) from error
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    names = [name for name in names if name != CARD and not any(part.startswith(".") for part in name.split("/"))]
    items = [_item(folder, name) for name in sorted(names, key=lambda name: name == DIFFUSERS.head)]

    @contextmanager
    def open_item(item: Item) -> Iterator[Path]:
        if _item(folder, item.name) != item:
            raise ConfigError(f"{folder / item.name}: was changed while it was pushed; push it again")
        yield folder / item.name

    def text(repo: str, license: str) -> str:
        return diffusers_card(card, index, repo, license)

    return Package(DIFFUSERS, items, open_item, text)


def _item(folder: Path, name: str) -> Item:
    return Item(name, (folder / name).stat().st_size, file_digest(folder / name))
