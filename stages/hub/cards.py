"""README.md of a repository: the card that the hub shows."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from imagen_core.store import REMOVED, ArrayGroup, CaptionsGroup, EmbeddingGroup, ImagesGroup, Manifest
from imagen_core.store.files.digest import fingerprint_digest
from pipeline.units import human_bytes
from stages.hub.package import MODEL, UNKNOWN, Item

if TYPE_CHECKING:
    from imagen_core.train import LoadedDenoiser

_RECIPE = ("template", "drop_prefix", "layers", "join", "final_norm", "pads", "padding_side", "cleaning", "empty")
"""Settings of an encoder's fingerprint that a card names where they are set."""
_ENCODERS = ("encoder", "model", "revision", "recipe", "compute dtype", "dtype", "width", "max tokens", "fingerprint")
_MADE_WITH = "imagen-precompute"


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """What the card of a store says.

    Attributes:
        num_removals: entries of the log of removals.
        dropped: input rows that are no samples, by reason; None if the store does not say.
        num_bytes: of all files.
        source: where the data came from, in words.
        recipes: names of shipped recipes, by encoder.
    """

    manifest: Manifest
    num_removals: int
    dropped: Mapping[str, int] | None
    num_bytes: int
    source: str
    recipes: Mapping[str, str] = field(default_factory=dict)


def store_card(facts: StoreFacts, repo: str, license: str) -> str:
    """The card of a store."""
    manifest = facts.manifest
    excluded = Counter(reason for rows in manifest.excluded.values() for reason in rows.values())
    removed = excluded.pop(REMOVED, 0)
    rows: list[tuple[str, object]] = [
        ("samples", f"{manifest.num_samples:,}"),
        ("input rows", "unknown" if manifest.input_rows is None else f"{manifest.input_rows:,}"),
        ("dropped", "unknown" if facts.dropped is None else _counts(facts.dropped)),
        ("excluded", _counts(excluded)),
        ("removed", f"{removed:,} in {facts.num_removals:,} removals" if facts.num_removals else "0"),
        ("filtered", f"{manifest.filtered:,}"),
        ("shards", f"{manifest.num_shards:,}"),
        ("bytes", f"{facts.num_bytes:,} ({human_bytes(facts.num_bytes)})"),
        ("source", _code(facts.source)),
        ("licence", license),
        ("sha256 of the manifest", _code(manifest.sha256)),
        ("schema version", manifest.schema_version),
    ]
    if manifest.failed_shards:
        rows.insert(6, ("failed shards", f"{len(manifest.failed_shards):,}"))
    sizes = _group_bytes(manifest)
    groups = [(_code(name), _group(group), human_bytes(sizes[name])) for name, group in manifest.groups.items()]
    encoders = [
        (group.encoder, group.dtype, group.dim, group.fingerprint)
        for group in manifest.groups.values()
        if isinstance(group, EmbeddingGroup)
    ]
    example = _store_example(manifest, repo)
    body = [
        f"A store of {_MADE_WITH}: {manifest.num_samples:,} samples with text embeddings and image tensors, computed "
        "once, to train text-to-image models.",
        _table(("", ""), rows),
        "## Groups\n\n" + _table(("group", "is", "size"), groups),
        *_encoder_sections(_distinct(encoders), facts.recipes),
        "## How to use it\n\n"
        + _block("sh", f"pipeline pull {repo} --out STORE\npipeline verify STORE")
        + f"\n\nOr read it where it is, with `hf://datasets/{repo}` in the place of `STORE`."
        + "\n\n"
        + _block("python", example)
        + "\n\nThe dataset viewer shows the table `samples` alone: keys, captions and sizes. Rows that the manifest "
        "excludes are in it too.",
    ]
    metadata = _dataset_metadata(license, manifest.num_samples)
    metadata["configs"] = [{"config_name": "samples", "data_files": "samples/*.parquet"}]
    return _card(metadata, repo, body)


def export_card(
    description: Mapping[str, Any], num_bytes: int, source: str, recipes: Mapping[str, str], repo: str, license: str
) -> str:
    """The card of an export; `description` is its store.json."""
    store, kind = description["store"], str(description.get("format", ""))
    num_samples = int(description.get("num_samples", 0))
    rows: list[tuple[str, object]] = [
        ("samples", f"{num_samples:,}"),
        ("samples of the store", f"{int(store.get('num_samples', 0)):,}"),
        ("removals of the store", f"{int(store.get('num_removals', 0)):,}"),
        ("bytes", f"{num_bytes:,} ({human_bytes(num_bytes)})"),
        ("format", kind),
        ("images", ", ".join(f"{each['size_px']} px, {each['codec']}" for each in description.get("images", ()))),
        ("source", _code(source)),
        ("licence", license),
        ("sha256 of the store's manifest", _code(str(store.get("sha256", "")))),
    ]
    encoders = [
        (each["name"], each["dtype"], each["dim"], each["fingerprint"])
        for each in (*description.get("encoders", ()), *description.get("image_encoders", ()))
    ]
    usage = [_block("sh", f"pipeline pull {repo} --out EXPORT")]
    if kind == "parquet":
        usage.append(
            _block(
                "python",
                "from datasets import load_dataset\n\n"
                f'for sample in load_dataset("{repo}", split="train", streaming=True):\n'
                '    print(sample["text"], sample["image"].size)',
            )
        )
    body = [
        f"An export of a store of {_MADE_WITH}, as {kind}; `data/store.json` says what it was made from.",
        _table(("", ""), rows),
        *_encoder_sections(encoders, recipes),
        "## How to use it\n\n" + "\n\n".join(usage),
    ]
    metadata = _dataset_metadata(license, num_samples)
    if kind == "parquet":
        metadata["configs"] = [{"config_name": "default", "data_files": "data/*.parquet"}]
    return _card(metadata, repo, body)


def model_card(model: "LoadedDenoiser", item: Item, repo: str, license: str) -> str:
    """The card of a trained model that is one file."""
    config = model.denoiser.config.model_dump(mode="json")
    size, low_res = config.get("size_px"), config.get("low_res_px")
    images = "none: it generates embeddings" if size is None else f"{size} px"
    if low_res is not None:
        images = f"{low_res} -> {size} px"
    num_parameters = sum(parameter.numel() for parameter in model.denoiser.parameters())
    rows: list[tuple[str, object]] = [
        ("images", images),
        ("parameters", f"{num_parameters:,}"),
        ("weights", f"{model.weights} of step {model.step:,}"),
        ("bytes", f"{item.bytes:,} ({human_bytes(item.bytes)})"),
        ("sha256", _code(item.sha256)),
        ("licence", license),
    ]
    captions = model.encoder
    records = [captions] if isinstance(captions, Mapping) else list(captions or ())
    records = [*records, *model.embed_encoders.values()]
    encoders = [(each["name"], each["dtype"], each["dim"], each["fingerprint"]) for each in records]
    sample = "pipeline run sample --out images 'stages=[{checkpoint: MODEL}]' 'prompts=[a red fox in the snow]'"
    if low_res is not None:
        sample = sample.replace("{checkpoint: MODEL}", "{checkpoint: BASE}, {checkpoint: MODEL}")
    body = [
        f"A text-to-image diffusion model of {_MADE_WITH}: `{MODEL.head}` has its weights and configuration.",
        _table(("", ""), rows),
        *_encoder_sections(encoders, {}),
        "## How to use it\n\n"
        + _block("sh", f"pipeline pull {repo} --out MODEL\n{sample}")
        + "\n\n"
        + _block(
            "python",
            "from pathlib import Path\n\n"
            "from imagen_core.train import load_checkpoint\n\n"
            f'model = load_checkpoint(Path("MODEL/{MODEL.head}"))\n'
            "print(model.step, model.denoiser.config)",
        ),
    ]
    return _card(_model_metadata(license, "imagen-precompute"), repo, body)


def diffusers_card(card: str, index: Mapping[str, Any], repo: str, license: str) -> str:
    """The card of a folder that diffusers opens: its own, with the licence, or a short one.

    Args:
        card: README.md of the folder; "" if there is none.
    """
    from huggingface_hub import RepoCard

    if card:
        own = RepoCard(card, ignore_metadata_errors=True)
        own.data.license = license if license != UNKNOWN else (own.data.to_dict().get("license") or UNKNOWN)  # pyright: ignore[reportAttributeAccessIssue]
        return str(own).replace('"FOLDER"', f'"{repo}"')
    usage = f'from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{repo}")'
    body = [
        f"A pipeline of diffusers, `{index.get('_class_name', 'unknown')}`.",
        _table(("", ""), [("licence", license)]),
        "## How to use it\n\n" + _block("sh", f"pipeline pull {repo} --out MODEL") + "\n\n" + _block("python", usage),
    ]
    return _card(_model_metadata(license, "diffusers"), repo, body)


def _card(metadata: Mapping[str, Any], repo: str, body: Sequence[str]) -> str:
    import yaml

    head = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n# {repo.rpartition('/')[2]}\n\n" + "\n\n".join(body) + "\n"


def _dataset_metadata(license: str, num_samples: int) -> dict[str, Any]:
    return {
        "license": license,
        "task_categories": ["text-to-image"],
        "tags": ["imagen-precompute", "text-embeddings"],
        "size_categories": [_size_category(num_samples)],
    }


def _model_metadata(license: str, library: str) -> dict[str, Any]:
    return {
        "license": license,
        "library_name": library,
        "pipeline_tag": "text-to-image",
        "tags": ["imagen-precompute", "diffusion"],
    }


def _size_category(count: int) -> str:
    """How the hub writes numbers of samples: `n<1K`, `1K<n<10K` ..."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    below = next((at for at in range(len(names)) if count < 10 ** (at + 3)), len(names))
    if below == 0:
        return "n<1K"
    return "n>1T" if below == len(names) else f"{names[below - 1]}<n<{names[below]}"


def _store_example(manifest: Manifest, repo: str) -> str:
    lines = ["from imagen_core.store import Store", "", 'store = Store.open("STORE")', "sample = store[0]"]
    lines.append("print(len(store), sample.key, sample.captions)")
    options = ["batch_size=2"]
    if manifest.images:
        size = next(iter(manifest.images))
        lines.append(f"print(sample.images[{size}].shape)  # uint8")
        options.append(f"images=[{size}]")
    if manifest.texts:
        name = next(iter(manifest.texts))
        lines.append(f"print(sample.text[{json.dumps(name)}][0].shape)  # of the first caption: tokens, then width")
        options.append(f"text={json.dumps(name)}")
    lines.append(f"loader = store.loader({', '.join(options)})")
    return "\n".join(lines)


def _group_bytes(manifest: Manifest) -> dict[str, int]:
    totals = dict.fromkeys(manifest.groups, 0)
    for shard in manifest.shards():
        for name, entry in shard.files.items():
            totals[name] += entry.bytes
    return totals


def _group(group: object) -> str:
    if isinstance(group, ImagesGroup):
        buckets = f", {len(group.shapes)} buckets" if group.shapes else ""
        return f"images of {group.size_px} px, {group.codec}{buckets}, {group.format}"
    if isinstance(group, EmbeddingGroup):
        layers = f", {len(group.layers)} layers" if group.layers else ""
        return f"embeddings of {group.encoder}{layers}, {group.dtype}, {group.format}"
    if isinstance(group, CaptionsGroup):
        return f"captions, set {group.caption_set}"
    if isinstance(group, ArrayGroup):
        return f"{group.spec}, {group.format}"
    return str(getattr(group, "format", ""))


_Encoder = tuple[str, str, int, Mapping[str, Any]]
"""Name, stored dtype, width, fingerprint."""


def _distinct(encoders: Iterable[_Encoder]) -> list[_Encoder]:
    """Each encoder once: it may have a group for each set of captions."""
    return list({(name, fingerprint_digest(found)): (name, *rest, found) for name, *rest, found in encoders}.values())  # type: ignore[misc]


def _encoder_sections(encoders: Sequence[_Encoder], recipes: Mapping[str, str]) -> list[str]:
    if not encoders:
        return []
    rows, details = [], []
    for name, dtype, dim, found in encoders:
        settings = {key: found[key] for key in _RECIPE if found.get(key) not in (None, [], {}, ())}
        recipe = recipes.get(name) or ("own settings" if settings else "none")
        rows.append(
            (
                name,
                _code(str(found.get("model", "unknown"))),
                found.get("revision") or "-",
                recipe,
                found.get("compute_dtype", "unknown"),
                dtype,
                dim,
                found.get("max_tokens", "-"),
                _code(fingerprint_digest(found)),
            )
        )
        if settings:
            details.append(
                f"Recipe of {name}:\n\n" + _block("json", json.dumps(settings, indent=1, ensure_ascii=False))
            )
    return ["## Encoders\n\n" + _table(_ENCODERS, rows), *details]


def _counts(by_reason: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(by_reason.items()))
    return f"{sum(by_reason.values()):,}" + (f" ({reasons})" if reasons else "")


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    ]
    return "\n".join(lines)
