"""Tiny image-text models with random weights, of two architectures."""

from pathlib import Path
from typing import Any

from tests.word_tokenizer import write_word_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} a picture of"
)
KINDS = ("llava", "idefics3")
SIDE_PX = 16


def write_describer(folder: Path, kind: str, seed: int = 0) -> None:
    """Saves a model with its processor."""
    import torch

    tokenizer = write_word_tokenizer(folder, template="$A")
    marks = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    marks += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    torch.manual_seed(seed)
    model, processor = {"llava": _llava, "idefics3": _idefics3}[kind](tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def _text_config(tokenizer: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        max_position_embeddings=256,
        initializer_range=0.6,  # so that captions of images differ
    )


def _llava(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE_PX,
        patch_size=8,
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision, text_config=_text_config(tokenizer), image_token_index=image_token, image_seq_length=4
    )
    pixels = CLIPImageProcessor(size={"shortest_edge": SIDE_PX}, crop_size={"height": SIDE_PX, "width": SIDE_PX})
    processor = LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return LlavaForConditionalGeneration(config), processor


def _idefics3(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )

    vision: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE_PX,
        "patch_size": 4,
        "initializer_range": 0.2,
    }
    config = Idefics3Config(
        vision_config=vision,
        text_config=_text_config(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    pixels = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE_PX}, max_image_size={"longest_edge": SIDE_PX})
    processor = Idefics3Processor(pixels, tokenizer, image_seq_len=4, chat_template=TEMPLATE)
    return Idefics3ForConditionalGeneration(config), processor
