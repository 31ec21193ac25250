"""Small models of every kind of encoder, with random weights, as folders that transformers saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    ByT5Tokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaModel,
    LongT5Config,
    LongT5EncoderModel,
    MT5Config,
    MT5EncoderModel,
    Qwen2Config,
    Qwen2Model,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5GemmaModel,
    UMT5Config,
    UMT5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from stages.encoders.tiny import write_tiny_model
from tests.word_tokenizer import write_word_tokenizer

T5_SHAPE = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3, "feed_forward_proj": "gated-gelu"}
SHAPE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
CLIP_TEXT = {**SHAPE, "projection_dim": 16, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}


def t5(folder: Path) -> None:
    write_tiny_model(folder)


def mt5(folder: Path) -> None:
    MT5EncoderModel(MT5Config(**T5_SHAPE, vocab_size=tokenizer(folder))).save_pretrained(folder)


def umt5(folder: Path) -> None:
    UMT5EncoderModel(UMT5Config(**T5_SHAPE, vocab_size=tokenizer(folder))).save_pretrained(folder)


def byt5(folder: Path) -> None:
    T5EncoderModel(T5Config(**T5_SHAPE, vocab_size=384)).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)


def clip(folder: Path) -> None:
    """A whole CLIP, images and all, as on the hub."""
    text = {**CLIP_TEXT, "vocab_size": tokenizer(folder, "</s>", "<unk> $A </s>")}
    vision = {**SHAPE, "image_size": 32, "patch_size": 8, "projection_dim": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)


def clip_text(folder: Path) -> None:
    """The text half alone, as in the folder of a diffusion model."""
    vocabulary = tokenizer(folder, "</s>", "<unk> $A </s>")
    CLIPTextModel(CLIPTextConfig(**CLIP_TEXT, vocab_size=vocabulary)).save_pretrained(folder)


def deberta(folder: Path) -> None:
    config = DebertaV2Config(
        **SHAPE,
        vocab_size=tokenizer(folder, template="<unk> $A </s>"),
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
    )
    DebertaV2Model(config).save_pretrained(folder)


def bert(folder: Path) -> None:
    """Saved from masked-language training: there is no pooler."""
    vocabulary = tokenizer(folder, template="<unk> $A </s>")
    BertForMaskedLM(BertConfig(**SHAPE, vocab_size=vocabulary, pad_token_id=0)).save_pretrained(folder)


def xlm_roberta(folder: Path) -> None:
    """Its positions are counted from the id of the padding."""
    vocabulary = tokenizer(folder, template="<unk> $A </s>")
    XLMRobertaModel(XLMRobertaConfig(**SHAPE, vocab_size=vocabulary, pad_token_id=0)).save_pretrained(folder)


def llama(folder: Path) -> None:
    """A language model: causal, and nothing at the end of a caption."""
    vocabulary = tokenizer(folder, template="<unk> $A")
    LlamaModel(LlamaConfig(**SHAPE, num_key_value_heads=3, vocab_size=vocabulary)).save_pretrained(folder)


def qwen2(folder: Path) -> None:
    """A language model without a token at either end of a caption: "" has no token of its own."""
    vocabulary = tokenizer(folder, template="$A")
    Qwen2Model(Qwen2Config(**SHAPE, num_key_value_heads=3, vocab_size=vocabulary)).save_pretrained(folder)


def bare_llama(folder: Path) -> None:
    """A language model whose tokenizer, which is not of its own class, adds no token either."""
    vocabulary = tokenizer(folder, template="$A")
    LlamaModel(LlamaConfig(**SHAPE, num_key_value_heads=3, vocab_size=vocabulary)).save_pretrained(folder)


def t5gemma(folder: Path) -> None:
    """An encoder and a decoder."""
    part = {**SHAPE, "num_key_value_heads": 3, "head_dim": 8, "vocab_size": tokenizer(folder), "layer_types": None}
    T5GemmaModel(T5GemmaConfig(encoder=part, decoder=part, vocab_size=part["vocab_size"])).save_pretrained(folder)


def long_t5(folder: Path) -> None:
    """Its encoder alone."""
    LongT5EncoderModel(LongT5Config(**T5_SHAPE, vocab_size=tokenizer(folder))).save_pretrained(folder)


def siglip_text(folder: Path) -> None:
    SiglipTextModel(SiglipTextConfig(**siglip_shape(folder))).save_pretrained(folder)


def siglip(folder: Path) -> None:
    """Both halves, as on the hub."""
    vision = {**SHAPE, "image_size": 32, "patch_size": 8}
    SiglipModel(SiglipConfig(text_config=siglip_shape(folder), vision_config=vision)).save_pretrained(folder)


def siglip_shape(folder: Path) -> dict[str, Any]:
    return {**SHAPE, "vocab_size": tokenizer(folder), "projection_size": 24, "max_position_embeddings": 128}


def bart(folder: Path) -> None:
    """Its encoder is a part of the loaded model."""
    shape = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "max_position_embeddings": 128}
    BartModel(BartConfig(**shape, **heads, vocab_size=tokenizer(folder), pad_token_id=0)).save_pretrained(folder)


def tokenizer(folder: Path, pad: str = "<pad>", template: str = "$A </s>") -> int:
    """The tiny T5's vocabulary with other tokens around a caption; returns its size."""
    return len(write_word_tokenizer(folder, pad, template))


def write(make: Callable[[Path], None], folder: Path) -> Path:
    """The folder, with weights in which every layer and every norm matters."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    make(folder)
    weights = load_file(folder / "model.safetensors")
    for value in weights.values():
        if value.is_floating_point():
            value += 0.1 * torch.randn_like(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
