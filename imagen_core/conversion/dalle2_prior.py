"""DALLE2-pytorch's priors: settings and weights (DALLE2-pytorch 1.0 to 1.15.6, DiffusionPrior and
DiffusionPriorNetwork).

Before 1.9 its networks have no learned embeddings of a dropped caption and image, and before 1.4.3 attention without
cosine similarity, whose position bias counts 128 times.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from imagen_core.conversion.weights import match_parameters
from imagen_core.diffusion.config import PriorConfig

_PRIOR: dict[str, Any] = {  # arguments of the class DiffusionPrior
    "image_embed_dim": None,
    "timesteps": 1000,
    "sample_timesteps": None,
    "loss_type": "l2",
    "predict_x_start": True,
    "predict_v": False,
    "beta_schedule": "cosine",
    "condition_on_text_encodings": True,
    "sampling_clamp_l2norm": False,
    "training_clamp_l2norm": False,
    "init_image_embed_l2norm": False,
    "image_embed_scale": None,
}
_NOT_READ = {  # of CLIP and of training; embeddings generated here are always unit vectors
    *("clip", "clip_adapter_overrides", "image_size", "image_channels", "sampling_final_clamp_l2norm"),
    *("cond_drop_prob", "text_cond_drop_prob", "image_cond_drop_prob"),
}
_NETWORK: dict[str, Any] = {  # arguments of the class DiffusionPriorNetwork
    "num_timesteps": None,
    "num_time_embeds": 1,
    "num_image_embeds": 1,
    "num_text_embeds": 1,
    "max_text_len": None,
    "self_cond": False,
    "dim_head": 64,
    "heads": 8,
    "ff_mult": 4,
    "norm_in": False,
    "norm_out": True,
    "ff_dropout": 0.0,
    "final_proj": True,
    "normformer": False,
    "rotary_emb": True,
}
_TRAINING_ONLY = {"attn_dropout"}
Version = tuple[int, ...]
LATEST: Version = (1, 15, 6)
_OLDEST: Version = (1, 0)
_COSINE: Version = (1, 4, 3)
_LEARNED_NULLS: Version = (1, 9)
_EXACT_SINUSOIDS: Version = (1, 10, 9)
_V_AND_ESTIMATES: Version = (1, 12, 4)
_OLD_BIAS = 128
_MAX_TEXT_LEN = 256
_CANDIDATES = 2
_RULES = (  # its names -> names here; each is applied once, in this order
    (r"^learned_query$", "query"),
    (r"^null_text_encodings$", "null_text_tokens"),
    (r"^null_text_embeds$", "null_text_embed"),
    (r"^null_image_embed$", "null_image"),
    (r"^to_text_embeds\.0\.", "to_text_embed."),
    (r"^to_image_embeds\.0\.", "to_image."),
    (r"^to_time_embeds\.0\.weight$", "steps.weight"),
    (r"^to_time_embeds\.0\.1\.net\.0\.0\.", "to_time.0."),
    (r"^to_time_embeds\.0\.1\.net\.1\.0\.", "to_time.2."),
    (r"^to_time_embeds\.0\.1\.net\.2\.", "to_time.4."),
    (r"^causal_transformer\.", ""),
    (r"^rel_pos_bias\.relative_attention_bias\.", "bias.embedding."),
    (r"^norm\.g$", "norm_out.weight"),
    (r"^project_out\.", "project."),
    (r"^layers\.\d+\.0\.rotary_emb\.freqs$", "rotary.frequencies"),
    (r"^(layers\.\d+)\.0\.to_out\.1\.g$", r"\1.norm_out.weight"),
    (r"^(layers\.\d+)\.0\.norm\.g$", r"\1.norm.weight"),
    (r"^(layers\.\d+)\.0\.to_out\.0\.", r"\1.attention.to_out."),
    (r"^(layers\.\d+)\.0\.", r"\1.attention."),
    (r"^(layers\.\d+)\.1\.", r"\1.feed_forward."),
    (r"\.g$", ".weight"),
)


def prior_config(settings: Mapping[str, Any], version: Version = LATEST) -> tuple[PriorConfig, dict[str, Any]]:
    """The configuration of a prior, and how DALLE2-pytorch samples from it.

    Args:
        settings: arguments of its class DiffusionPrior; `net` has those of DiffusionPriorNetwork.
        version: of DALLE2-pytorch, that the prior was trained with.
    Raises:
        ValueError: a setting is unknown, missing, or has no counterpart here.
    """
    net = settings.get("net")
    if not isinstance(net, Mapping) or "dim" not in net or "depth" not in net:
        raise ValueError(f"net must have dim and depth; give the settings of a DiffusionPrior (got {net!r})")
    for name, given, known in (
        ("", settings, _PRIOR.keys() | _NOT_READ | {"net"}),
        ("net.", net, _NETWORK.keys() | _TRAINING_ONLY | {"dim", "depth"}),
    ):
        unknown = sorted(given.keys() - known)
        if unknown:
            raise ValueError(f"{name}{', '.join(unknown)}: not a setting of DALLE2-pytorch 1.15.6's prior")
    prior, network = {**_PRIOR, **settings}, {**_NETWORK, **net}
    _check(prior, network, version)
    reads_text = prior["condition_on_text_encodings"]
    config = {
        "kind": "prior",
        "network": {
            "dim": network["dim"],
            "depth": network["depth"],
            "num_heads": network["heads"],
            "head_dim": network["dim_head"],
            "ff_mult": network["ff_mult"],
            "text_dim": network["dim"] if reads_text else None,
            "max_text_tokens": network["max_text_len"] or _MAX_TEXT_LEN,
            "learned_text_tokens": not reads_text,
            "unit_text_embed": True,
            "num_timesteps": network["num_timesteps"],
            "num_time_tokens": network["num_time_embeds"],
            "num_image_tokens": network["num_image_embeds"],
            "num_text_embed_tokens": network["num_text_embeds"],
            "sinusoids": "closed",
            "self_conditioning": network["self_cond"],
            "cosine_attention": version >= _COSINE,
            "rotary": network["rotary_emb"],
            "null_position": True,
            "ff_norm": network["normformer"],
            "norm_out": network["norm_out"],
            "stable_norm_out": network["norm_out"],
            "final_projection": network["final_proj"],
            "dropout": network["ff_dropout"],
        },
        "diffusion": {
            "schedule": {"kind": "discrete", "num_steps": prior["timesteps"], "beta": prior["beta_schedule"]},
            "objective": "v" if prior["predict_v"] else "x0",
            "loss": prior["loss_type"],
        },
        "embed_length": prior["image_embed_scale"],
        "clamp_prediction": prior["training_clamp_l2norm"],
    }
    return PriorConfig.model_validate(config), _sampling(prior)


def _check(prior: Mapping[str, Any], network: Mapping[str, Any], version: Version) -> None:
    """Raises ValueError for settings without a counterpart."""
    check_version("a prior", version, _OLDEST)
    if network["num_timesteps"] is None:
        check_version("net.num_timesteps: null", version, _EXACT_SINUSOIDS)
    for name, used in (("net.self_cond", network["self_cond"]), ("predict_v", prior["predict_v"])):
        if used:
            check_version(name, version, _V_AND_ESTIMATES)
    if network["norm_in"]:
        raise ValueError("net.norm_in is True, but only False has a counterpart here")
    if not prior["predict_x_start"]:
        raise ValueError("predict_x_start is False: it clips such estimates to [-1, 1], which has no counterpart here")
    if prior["training_clamp_l2norm"] and (prior["predict_v"] or not prior["sampling_clamp_l2norm"]):
        raise ValueError(
            "training_clamp_l2norm has a counterpart here only with sampling_clamp_l2norm and without predict_v; set "
            "sampling_clamp_l2norm to true to sample as it was trained"
        )
    width, scale = network["dim"], prior["image_embed_scale"]
    if prior["image_embed_dim"] not in (None, width):
        raise ValueError(f"image_embed_dim is {prior['image_embed_dim']}, but net.dim is {width}; they must be equal")
    if prior["init_image_embed_l2norm"] and scale not in (None, width**0.5):
        raise ValueError(f"init_image_embed_l2norm has no counterpart here with an image_embed_scale of {scale}")


def check_version(what: str, version: Version, since: Version) -> None:
    """Raises ValueError if what is imported is of a version that computed something else than those since then."""
    if version < since:
        found, oldest = (".".join(map(str, numbers)) for numbers in (version, since))
        raise ValueError(
            f"{what} of version {found} of DALLE2-pytorch computes something else than since {oldest}, which is what "
            "has a counterpart here"
        )


def _sampling(prior: Mapping[str, Any]) -> dict[str, Any]:
    """Ancestral in all steps, or DDIM with eta 1 in fewer; the best of two."""
    steps = prior["sample_timesteps"] or prior["timesteps"]
    return {
        "sampler": {"kind": "ancestral"} if steps == prior["timesteps"] else {"kind": "ddim", "eta": 1.0},
        "grid": {"kind": "uniform"},
        "num_steps": steps,
        "threshold": {"kind": "length" if prior["sampling_clamp_l2norm"] else "none"},
        "num_candidates": _CANDIDATES,
        "start_at_length": prior["init_image_embed_l2norm"],
    }


def prior_weights(state: Mapping[str, Tensor], config: PriorConfig, version: Version = LATEST) -> dict[str, Tensor]:
    """The parameters of `config.network.build()`, by name, from a state dict of a DiffusionPriorNetwork.

    Learned embeddings that its version does not have are zero.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    return match_parameters(_named(state, config, version), config.network)


def _named(state: Mapping[str, Tensor], config: PriorConfig, version: Version) -> Iterator[tuple[str, str, Tensor]]:
    # its feed-forward layers have an empty place for each part that is left out
    last = 3 + config.network.ff_norm + (config.network.dropout > 0)
    network = config.network
    if version < _LEARNED_NULLS:
        yield "null_text_embeds", "null_text_embed", torch.zeros(network.num_text_embed_tokens, network.dim)
        yield "null_image_embed", "null_image", torch.zeros(network.dim)
    for name, values in state.items():
        converted = convert_name(name).replace("feed_forward.5.", f"feed_forward.{last}.")
        if converted == "to_time.0.weight":  # it has sines first, this library cosines
            values = values.roll(values.shape[1] // 2, dims=1)
        elif converted == "bias.embedding.weight" and version < _COSINE:
            values = values * _OLD_BIAS
        elif name == "null_text_embed" and version < _LEARNED_NULLS:
            converted = "null_text_tokens"
        yield name, converted, values


def convert_name(name: str) -> str:
    """The name here of a tensor of DALLE2-pytorch's prior network."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name
