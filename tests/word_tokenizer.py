"""The tiny T5's vocabulary, a token a word, as the tokenizer of other small models."""

from pathlib import Path
from typing import Any

from stages.encoders.tiny import write_tiny_model


def write_word_tokenizer(folder: Path, pad: str = "<pad>", template: str = "$A </s>") -> Any:
    """Saves a tokenizer of transformers into the folder, and returns it.

    Args:
        template: what stands around a caption `$A`, of `</s>` and `<unk>`.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    write_tiny_model(folder)
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (folder / "model.safetensors").unlink()
    special = [(token, core.token_to_id(token)) for token in ("</s>", "<unk>")]
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return tokenizer
