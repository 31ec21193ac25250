"""`pipeline import open-clip`: a CLIP in the files of open_clip becomes a model folder in the format of transformers.

open_clip_config.json        model_cfg (embed_dim, text_cfg, vision_cfg, quick_gelu) and preprocess_cfg (mean, std)
open_clip_model.safetensors  its tensors, or open_clip_pytorch_model.bin
tokenizer.json, ...          the tokenizer; where the folder has none, it is that of --encoder-model

Encoders of kind clip read the result. open_clip takes the state of the token with the highest id for the caption's; so
does transformers where eos_token_id is 2.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands import CommandResult
from pipeline.config import local_path
from pipeline.errors import EXIT_OK, ConfigError, first_line
from pipeline.storage.files import commit_folder, read_json, unfinished_folder, write_text
from stages.checkpoints.imported import check_new, load_tensors
from stages.encoders.model_files import OPEN_CLIP_CONFIG, find_model, tokenizer_files

if TYPE_CHECKING:
    from torch import Tensor

_SAFETENSORS, _PICKLED = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
_VISION = {"image_size": 224, "patch_size": 16, "width": 768, "head_width": 64, "layers": 12, "mlp_ratio": 4.0}
_ACCEPTED: dict[str, tuple[object, ...]] = {
    "pool_type": ("argmax", "tok"),
    "proj_type": ("linear",),
    "pos_embed_type": ("learnable",),
    "block_type": ("default",),
}
"""Settings of a half that may be there with these values; others may be null, false or empty."""
_NO_EFFECT = frozenset(
    (
        *("hf_tokenizer_name", "output_tokens", "pad_id", "eos_id"),
        *("patch_dropout", "attn_pooler_queries", "attn_pooler_heads"),
    )
)
"""Settings that change nothing in the CLIPs that are read: they are for training, or for parts that these lack."""
_MODEL = frozenset(("embed_dim", "quick_gelu", "custom_text", "text_cfg", "vision_cfg"))
_TRAINED_WITH = frozenset(("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"))
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)")
_PARTS = {
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_LEFT_OUT = ("logit_", "visual.", "vision_model.", "visual_projection.")
"""Tensors that a text half does not need, and the logit's bias."""
_TRANSPOSED = ("text_projection", "visual.proj")


def import_open_clip(paths: Sequence[str], *, out: str, encoder_model: str | None = None) -> CommandResult:
    """Writes a model folder: config.json, model.safetensors, the tokenizer and preprocessor_config.json.

    A ResNet or another image half is left out; the text half is imported all the same.

    Args:
        paths: a folder with the files of open_clip.
        encoder_model: folder or hub id of a model with the same tokenizer, if the folder has none.
    Raises:
        ConfigError: files that are missing, damaged or do not fit together, or settings without a counterpart.
        MachineError: the model with the tokenizer cannot be found.
    """
    if len(paths) != 1:
        raise ConfigError(f"give one folder with the files of open_clip (got {len(paths)} paths)")
    folder, target = Path(paths[0]), local_path(out, "--out")
    check_new(target, out)
    settings = read_json(folder / OPEN_CLIP_CONFIG)
    if not isinstance(settings, dict) or not isinstance(settings.get("model_cfg"), dict):
        raise ConfigError(
            f"{folder}: has no {OPEN_CLIP_CONFIG} with a model_cfg; give a folder with the files of open_clip"
        )
    config = _config(settings["model_cfg"], f"{folder / OPEN_CLIP_CONFIG}: model_cfg")
    preprocessing = _preprocessing(settings.get("preprocess_cfg") or {}, f"{folder / OPEN_CLIP_CONFIG}")
    tokenizer = tokenizer_files(folder) or _other_tokenizer(encoder_model)
    if not tokenizer:
        raise ConfigError(
            f"{folder}: has no tokenizer; say with --encoder-model where a model with the same one is (for "
            "open_clip's own: a CLIP such as openai/clip-vit-large-patch14)"
        )
    tensors = _tensors(folder, config)
    with unfinished_folder(target) as temporary:
        check_new(target, out)  # another process may have ended meanwhile
        _write(temporary, config, tensors, preprocessing)
        for file in tokenizer:
            shutil.copyfile(file, temporary / file.name)
        commit_folder(temporary, target)
    has_images = config["model_type"] == "clip"
    lines = [
        f"{folder} -> {target}" + ("" if has_images else ", without its image half, which is no vision transformer"),
        f"encode: pipeline run precompute 'encoders=[{{name: clip, kind: clip, model: {target}}}]'",
    ]
    return {"model": str(target), "tensors": len(tensors), "images": has_images}, lines, EXIT_OK


def _other_tokenizer(model: str | None) -> list[Path]:
    if model is None:
        return []
    return tokenizer_files(Path(model) if Path(model).is_dir() else find_model(model, None).folder)


def _config(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config.json of a CLIP of transformers; of its text half alone if the other is no vision transformer.

    Raises:
        ConfigError: a setting without a counterpart.
    """
    text_cfg, vision_cfg, dim = model.get("text_cfg"), model.get("vision_cfg"), model.get("embed_dim")
    if not isinstance(text_cfg, dict) or not isinstance(vision_cfg, dict) or not _is_size(dim):
        raise ConfigError(f"{where}: has no embed_dim, text_cfg and vision_cfg; give a CLIP of open_clip")
    if unknown := sorted(key for key, value in model.items() if value and key not in _MODEL | _TRAINED_WITH):
        raise ConfigError(f"{where}.{unknown[0]}: is not of a plain CLIP, and only those are read")
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    text = _half(text_cfg, "text_cfg", _TEXT, where)
    of_text = {
        "model_type": "clip_text_model",
        **_shape(text, text["heads"], act),
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["context_length"],
        "projection_dim": dim,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if vision_cfg.get("timm_model_name") or isinstance(vision_cfg.get("layers"), list):
        return {"architectures": ["CLIPTextModelWithProjection"], **of_text}
    vision = _half(vision_cfg, "vision_cfg", _VISION, where)
    of_images = {
        "model_type": "clip_vision_model",
        **_shape(vision, vision["width"] // vision["head_width"], act),
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "projection_dim": dim,
    }
    both = {"text_config": of_text, "vision_config": of_images, "projection_dim": dim}
    return {"architectures": ["CLIPModel"], "model_type": "clip", **both}


def _half(settings: Mapping[str, Any], name: str, known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a half with open_clip's defaults; ConfigError if another one is used."""
    for key, value in settings.items():
        if value and key not in known.keys() | _NO_EFFECT and value not in _ACCEPTED.get(key, ()):
            raise ConfigError(
                f"{where}.{name}.{key}: is {value!r}, which CLIP in transformers has not; give a plain CLIP, or "
                "the model in the format of transformers (kind: auto reads other text encoders)"
            )
        if key in known and value is not None and not _is_size(value, float if key == "mlp_ratio" else int):
            raise ConfigError(f"{where}.{name}.{key}: must be a positive number (got {value!r}); give a plain CLIP")
    return {**known, **{key: settings[key] for key in known if settings.get(key) is not None}}


def _is_size(value: object, kind: type[int | float] = int) -> bool:
    return isinstance(value, (int, kind)) and not isinstance(value, bool) and value > 0


def _shape(half: Mapping[str, Any], heads: int, act: str) -> dict[str, Any]:
    return {
        "hidden_size": half["width"],
        "intermediate_size": int(half["width"] * half["mlp_ratio"]),
        "num_hidden_layers": half["layers"],
        "num_attention_heads": heads,
        "hidden_act": act,
        "layer_norm_eps": 1e-5,
    }


def _tensors(folder: Path, config: Mapping[str, Any]) -> "dict[str, Tensor]":
    """The tensors by transformers' names; all that the configuration needs, and no others.

    Raises:
        ConfigError: there are none, or they do not fit the settings.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoConfig, CLIPModel, CLIPTextModelWithProjection

    file = folder / _SAFETENSORS
    try:
        state = load_file(file) if file.is_file() else load_tensors(folder / _PICKLED, str(folder / _PICKLED))
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: cannot be read ({first_line(error)})") from error
    has_images = config["model_type"] == "clip"
    settings = {key: value for key, value in config.items() if key != "model_type"}
    try:
        with torch.device("meta"):
            made: Any = AutoConfig.for_model(config["model_type"], **settings)
            model = CLIPModel(made) if has_images else CLIPTextModelWithProjection(made)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{folder / OPEN_CLIP_CONFIG}: cannot be built ({first_line(error)})") from error
    needed = {name: values.shape for name, values in model.state_dict().items()}
    found = {name: values for full, part in state.items() for name, values in _renamed(full, part)}
    found = {name: values for name, values in found.items() if name in needed or not name.startswith(_LEFT_OUT)}
    wrong = sorted(
        name
        for name in needed.keys() | found.keys()
        if name not in needed or name not in found or found[name].shape != needed[name]
    )
    if wrong:
        name = wrong[0]
        shapes = [str(tuple(of[name])) if name in of else "absent" for of in (needed, _shapes(found))]
        raise ConfigError(
            f"{folder}: {len(wrong)} tensors do not fit {OPEN_CLIP_CONFIG} ({name}: {shapes[0]} by the settings, "
            f"{shapes[1]} in the file); give the files of one CLIP"
        )
    return {name: values.contiguous() for name, values in found.items()}


def _shapes(tensors: "Mapping[str, Tensor]") -> dict[str, Sequence[int]]:
    return {name: values.shape for name, values in tensors.items()}


def _renamed(full: str, values: "Tensor") -> "Iterator[tuple[str, Tensor]]":
    """A tensor of open_clip under its names in transformers; an unknown one keeps its name."""
    name = full.removeprefix("text.")  # of models with custom_text
    block = _BLOCK.fullmatch(name)
    if block is None:
        values = values.T if name in _TRANSPOSED else values
        yield _NAMES.get(name, full), values.reshape(()) if name == "logit_scale" else values
        return
    layer = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}."
    if block[3] == "attn.in_proj_":
        for projection, part in zip("qkv", values.chunk(3), strict=True):
            yield f"{layer}self_attn.{projection}_proj.{block[4]}", part
    else:
        yield layer + _PARTS.get(block[3], block[3]) + block[4], values


def _preprocessing(settings: Any, where: str) -> dict[str, list[float]]:
    """The preprocessor_config.json; settings left out are left out of it too."""
    found = {}
    for name in ("mean", "std"):
        value = settings.get(name) if isinstance(settings, dict) else settings
        if value is None:
            continue
        if not isinstance(value, list) or len(value) != 3 or not all(type(one) in (int, float) for one in value):
            raise ConfigError(f"{where}: preprocess_cfg.{name}: must be three numbers (got {value!r})")
        found[f"image_{name}"] = value
    return found


def _write(
    folder: Path, config: Mapping[str, Any], tensors: "dict[str, Tensor]", preprocessing: Mapping[str, Any]
) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_text(folder / "config.json", json.dumps(config, indent=2))
    if config["model_type"] == "clip":
        write_text(folder / "preprocessor_config.json", json.dumps(preprocessing, indent=2))
