"""A long caption costs no more than its beginning, whose tokens are those of the whole caption."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from stages.encoders.batches.tokens import reads_words_alone, tokenize
from stages.encoders.tiny import write_tiny_model

TEXT = (
    "a red fox runs in the SNOW; photo-like, 4k (3:4) isn't it?  двое на улице ΣΑΣ ΣΑ\u0301Σ ñandú café "
    "e\u0301te\u0301 ﬁne ① ｆｕｌｌ 東京の猫 한국어 \u3164 \u200b x\u200d \U0001f408\u200d\u2b1b <unk> </s> "
    "<|endoftext|> ' \" ... --- ئاپ خط عربي हिन्दी 12,345.67 https://a.b/c?d=e"
)
WORDS = TEXT.split(" ")
SPACES = ["\u00a0", "\u3000", "\u2028", "\n", "\t", ".\r\n\n"]
GPT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CLIP = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def long_caption(seed: int, words: int = 700, others: Sequence[str] = SPACES) -> str:
    rng = random.Random(seed)
    return "".join(
        rng.choice([*WORDS, *others]) + rng.choice([" ", " ", " ", "  ", ", "]) for _ in range(words)
    ).strip()


CORPUS = [long_caption(seed, 300, []) for seed in range(20)]


def trained(core: Any, trainer: Any, template: str = "$A </s>") -> Any:
    core.train_from_iterator(CORPUS, trainer)
    special = [(token, core.token_to_id(token)) for token in ("</s>", "<unk>")]
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


SPECIAL = {"special_tokens": ["<pad>", "</s>", "<unk>"], "show_progress": False}


def tiny_t5() -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder))
        return AutoTokenizer.from_pretrained(folder)


def unigram(*, splits: bool = True) -> Any:
    """As T5, mT5, DeBERTa-v2, XLM-R and SigLIP; without splits as plain SentencePiece."""
    core: Any = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    found = trained(core, trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", **SPECIAL))
    if not splits:
        found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return found


def byte_level_bpe() -> Any:
    """As Qwen, Llama 3 and GPT-2."""
    core: Any = Tokenizer(models.BPE(ignore_merges=True))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return trained(core, trainers.BpeTrainer(vocab_size=600, **SPECIAL), "$A")


def clip_bpe() -> Any:
    core: Any = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CLIP), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return trained(core, trainers.BpeTrainer(vocab_size=600, end_of_word_suffix="</w>", **SPECIAL), "<unk> $A </s>")


def bpe_without_splits() -> Any:
    """As Gemma and Llama 2: the whole caption is one word."""
    core: Any = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    found = trained(core, trainers.BpeTrainer(vocab_size=500, **SPECIAL), "<unk> $A")
    found.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    found.backend_tokenizer.pre_tokenizer = None
    return found


def word_piece() -> Any:
    core: Any = Tokenizer(models.WordPiece(unk_token="<unk>"))  # pyright: ignore[reportCallIssue]
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(core, trainers.WordPieceTrainer(vocab_size=300, **SPECIAL), "<unk> $A </s>")


KINDS: dict[str, Callable[[], Any]] = {
    "tiny T5": tiny_t5,
    "Unigram": unigram,
    "Unigram without splits": lambda: unigram(splits=False),
    "byte-level BPE": byte_level_bpe,
    "CLIP": clip_bpe,
    "BPE without splits": bpe_without_splits,
    "WordPiece": word_piece,
    "ByT5": ByT5Tokenizer,
}


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.characters = 0

    def __call__(self, texts: list[str], **options: object) -> Any:
        self.characters += sum(map(len, texts))
        return self.tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    @property
    def __class__(self) -> Any:
        return type(self.tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_the_beginning_of_a_long_caption_has_the_tokens_of_the_whole_one(kind: str) -> None:
    tokenizer = Counting(KINDS[kind]())
    captions = [long_caption(seed) for seed in range(12)] + [
        "word " * 1000 + "end",
        " " * 5_000 + "x",
        "a short one",
        "",
    ]
    for max_tokens in (2, 16):
        whole = tokenizer.tokenizer(captions, truncation=True, max_length=max_tokens)["input_ids"]
        tokenizer.characters = 0
        found, num_truncated = tokenize(tokenizer, captions, max_tokens)
        lengths = [len(ids) for ids in tokenizer.tokenizer(captions, verbose=False)["input_ids"]]
        assert found[:-1] == whole[:-1]
        assert num_truncated == sum(length > max_tokens for length in lengths)
        assert tokenizer.characters < 0.5 * sum(map(len, captions))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_spaces_is_read_whole(kind: str) -> None:
    tokenizer = KINDS[kind]()
    caption = "東京の猫x" * 1000
    found, _ = tokenize(tokenizer, [caption], 16)
    assert found == tokenizer([caption], truncation=True, max_length=16)["input_ids"]


def test_a_tokenizer_with_tokens_of_several_words_reads_captions_whole() -> None:
    core: Any = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer = trained(core, trainers.BpeTrainer(vocab_size=500, **SPECIAL))
    assert any(" " in token.strip() for token in tokenizer.get_vocab())
    assert not reads_words_alone(tokenizer)
    caption = long_caption(1)
    found, _ = tokenize(tokenizer, [caption], 16)
    assert found == tokenizer([caption], truncation=True, max_length=16)["input_ids"]


def test_a_tokenizer_that_makes_unknown_text_one_token_reads_captions_whole() -> None:
    core: Any = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    assert not reads_words_alone(PreTrainedTokenizerFast(tokenizer_object=core))


def test_a_tokenizer_that_cuts_at_the_left_reads_captions_whole() -> None:
    tokenizer = tiny_t5()
    tokenizer.truncation_side = "left"
    caption = long_caption(2)
    found, _ = tokenize(tokenizer, [caption], 16)
    assert found == tokenizer([caption], truncation=True, max_length=16)["input_ids"]
