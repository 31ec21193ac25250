"""`tiny-random-t5`: a small T5 encoder with seeded random weights, for runs without a download.

It is written as an ordinary model folder and loaded like any other T5, so that it exercises the real code.
Its embeddings distinguish words but carry no meaning.
"""

import json
from pathlib import Path

import numpy as np

TINY_MODEL = "tiny-random-t5"

_DIM, _FF, _HEADS, _HEAD_DIM, _LAYERS, _BUCKETS = 64, 160, 4, 16, 2, 32
_SEED = 20220523


def write_tiny_model(folder: Path) -> None:
    """Writes config.json, model.safetensors and tokenizer.json; the same bytes every time."""
    from safetensors.numpy import save_file

    tokenizer = tiny_tokenizer()
    vocabulary = len(json.loads(tokenizer)["model"]["vocab"])
    config = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": _DIM,
        "d_ff": _FF,
        "d_kv": _HEAD_DIM,
        "num_heads": _HEADS,
        "num_layers": _LAYERS,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": _BUCKETS,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "use_cache": False,
        "vocab_size": vocabulary,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
                "model_max_length": 512,
            }
        )
        + "\n",
        encoding="utf-8",
    )
    save_file(_weights(vocabulary), folder / "model.safetensors", metadata={"format": "pt"})


def _weights(vocabulary: int) -> dict[str, np.ndarray]:
    """Normal weights with T5's initial standard deviations, from numpy's frozen legacy generator."""
    random = np.random.RandomState(_SEED)

    def normal(rows: int, columns: int, std: float) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * std).astype(np.float32)

    inner = _HEADS * _HEAD_DIM
    weights = {"shared.weight": normal(vocabulary, _DIM, 1.0)}
    for layer in range(_LAYERS):
        block = f"encoder.block.{layer}"
        attention = f"{block}.layer.0.SelfAttention"
        weights[f"{attention}.q.weight"] = normal(inner, _DIM, (_DIM * _HEAD_DIM) ** -0.5)
        weights[f"{attention}.k.weight"] = normal(inner, _DIM, _DIM**-0.5)
        weights[f"{attention}.v.weight"] = normal(inner, _DIM, _DIM**-0.5)
        weights[f"{attention}.o.weight"] = normal(_DIM, inner, inner**-0.5)
        if layer == 0:
            weights[f"{attention}.relative_attention_bias.weight"] = normal(_BUCKETS, _HEADS, _DIM**-0.5)
        weights[f"{block}.layer.0.layer_norm.weight"] = np.ones(_DIM, np.float32)
        feed_forward = f"{block}.layer.1.DenseReluDense"
        weights[f"{feed_forward}.wi_0.weight"] = normal(_FF, _DIM, _DIM**-0.5)
        weights[f"{feed_forward}.wi_1.weight"] = normal(_FF, _DIM, _DIM**-0.5)
        weights[f"{feed_forward}.wo.weight"] = normal(_DIM, _FF, _FF**-0.5)
        weights[f"{block}.layer.1.layer_norm.weight"] = np.ones(_DIM, np.float32)
    weights["encoder.final_layer_norm.weight"] = np.ones(_DIM, np.float32)
    return weights


def tiny_tokenizer() -> str:
    """A T5-like unigram tokenizer: a token for each word of the synthetic captions, letters and bytes for the rest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    from stages.sources.synthetic.scenes import VOCABULARY

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary += [("▁", -5.0)]
    vocabulary += [(f"▁{word}", -3.0) for word in sorted(VOCABULARY)]
    letters = [chr(code) for code in range(33, 127)]
    vocabulary += [(letter, -8.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return tokenizer.to_str(pretty=False)
