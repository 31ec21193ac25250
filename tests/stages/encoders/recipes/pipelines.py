"""Tiny models of the classes that recipes use, and what the pipelines of diffusers make of captions with them."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from stages.captions import on_one_line
from stages.encoders.recipes.shipped import recipes
from tests.stages.encoders import tiny_models

SPECIAL = (
    *("<pad>", "</s>", "<s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CAPTIONS = (
    "a red circle above a blue square",
    "Été: 3 CATS, a dog's hat &amp; 50% off (1024x768)",
    "word " * 130 + "end",
    "one",
    'a sign:\n\t"OPEN"\r\n\nand a cat',
    '{\n  "subject": "a red fox",\n  "colors": ["red", "#ffffff"]\n}',
)
DECODER = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 40,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
VISION = {"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}

SHORT = {"max_tokens": 700}
"""For recipes of longer texts, which take long to compare; the probe has a text of max_tokens."""

Rows = list[np.ndarray]


def write_tokenizer(folder: Path, around: str, *, pad_token: str | None = "<pad>", chat: str | None = CHAT) -> int:
    """A tokenizer with a token for each byte; returns the size of its vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    named = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single=around, special_tokens=named)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        **({} if pad_token is None else {"pad_token": pad_token}),
        model_max_length=4096,
    )
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def decoder(name: str, around: str = "$A", layers: int = 3, **more: Any) -> Callable[[Path], None]:
    """Writes a language model of transformers."""

    def make(folder: Path) -> None:
        import transformers

        shape = {**DECODER, "num_hidden_layers": layers, "vocab_size": write_tokenizer(folder, around), **more}
        config = getattr(transformers, f"{name}Config")(**shape)
        getattr(transformers, f"{name}Model")(config).save_pretrained(folder)

    return make


def vision_language(name: str, layers: int = 3) -> Callable[[Path], None]:
    """Writes a model that writes about images, as published: with its head, and with vision."""

    def make(folder: Path) -> None:
        import transformers

        text = {**DECODER, "num_hidden_layers": layers, "vocab_size": write_tokenizer(folder, "$A")}
        text |= {"rope_parameters": MROPE, "rope_scaling": MROPE}
        vision = VISION | ({"deepstack_visual_indexes": [0]} if name == "Qwen3VL" else {"hidden_size": 32})
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
        getattr(transformers, f"{name}ForConditionalGeneration")(config).save_pretrained(folder)

    return make


def t5(name: str = "T5") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import transformers

        config = getattr(transformers, f"{name}Config")(
            **tiny_models.T5_SHAPE, vocab_size=write_tokenizer(folder, "$A </s>"), pad_token_id=0
        )
        getattr(transformers, f"{name}EncoderModel")(config).save_pretrained(folder)

    return make


def clip(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    shape = {**tiny_models.CLIP_TEXT, "vocab_size": write_tokenizer(folder, "<s> $A </s>", pad_token="</s>")}
    CLIPTextModel(CLIPTextConfig(**shape)).save_pretrained(folder)


def mistral3(folder: Path) -> None:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {"model_type": "mistral", **DECODER, "num_hidden_layers": 3}
    text["vocab_size"] = write_tokenizer(folder, "<s> $A")
    vision = {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 16, "head_dim": 8, "image_size": 28, "patch_size": 14}
    Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)).save_pretrained(folder)


def t5gemma(folder: Path) -> None:
    from transformers import T5GemmaConfig, T5GemmaModel

    part = {**DECODER, "num_hidden_layers": 2, "vocab_size": write_tokenizer(folder, "$A </s>"), "layer_types": None}
    T5GemmaModel(T5GemmaConfig(encoder=part, decoder=part, vocab_size=part["vocab_size"])).save_pretrained(folder)


# ---- what the pipelines give ----


def pipe(name: str, **parts: Any) -> Any:
    """A pipeline of diffusers with these parts and no others; ready for its `encode_prompt`."""
    diffusers = importlib.import_module("diffusers")
    found = object.__new__(getattr(diffusers, name))
    for part, value in {"transformer": None, **parts}.items():
        object.__setattr__(found, part, value)
    return found


def masked(embeddings: torch.Tensor, mask: torch.Tensor | None = None) -> Rows:
    """(B, L, D) as the rows where the mask is true; all of them without one."""
    if mask is None:
        return [rows.numpy() for rows in embeddings]
    return [rows[keep.bool()].numpy() for rows, keep in zip(embeddings, mask, strict=True)]


@dataclass(frozen=True)
class Case:
    """How a recipe is compared."""

    make: Callable[[Path], None]
    reference: Callable[[Any, Any, list[str]], Rows]
    """Model, tokenizer and captions -> the rows that the pipeline hands to its network."""
    model_class: str = "AutoModel"
    settings: dict[str, Any] = field(default_factory=dict)
    empty: Callable[[Any, Any, list[str]], Rows] | None = None
    """The same of the empty caption, where it has a rule of its own."""
    alone: bool = False
    """Whether the pipeline is given one caption a call, as in its batches captions change each other."""
    on_one_line: bool = False
    """Whether tabs and line ends are read as spaces, as by the tokenizers of T5 and CLIP, but not by the one here."""

    def config(self, recipe: str, folder: Path) -> dict[str, Any]:
        machine = {"model": str(folder), "compute_dtype": "float32", "num_gpus": 0}
        return {"name": recipe, "recipe": recipe, **machine, **self.settings}

    @torch.inference_mode()
    def expected(self, folder: Path, captions: Sequence[str]) -> Rows:
        """What the pipeline gives for some captions; for the empty one alone by its own rule."""
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = getattr(transformers, self.model_class).from_pretrained(folder, dtype=torch.float32).eval()
        run = self.empty if list(captions) == [""] and self.empty is not None else self.reference
        texts = [on_one_line(caption) for caption in captions] if self.on_one_line else list(captions)
        batches = [[text] for text in texts] if self.alone else [texts]
        return [rows for batch in batches for rows in run(model, tokenizer, batch)]


def deepfloyd(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("IFPipeline", text_encoder=model, tokenizer=tokenizer, unet=None)
    return masked(found.encode_prompt(captions, False, device="cpu", clean_caption=True)[0])


def pixart(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("PixArtSigmaPipeline", text_encoder=model, tokenizer=tokenizer)
    return masked(*found.encode_prompt(captions, False, device="cpu", clean_caption=True)[:2])


def t5_part(name: str, length: int, suffix: str = "", **parts: Any) -> Callable[[Any, Any, list[str]], Rows]:
    def run(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
        found = pipe(name, **{f"text_encoder{suffix}": model, f"tokenizer{suffix}": tokenizer}, **parts)
        result = found._get_t5_prompt_embeds(captions, max_sequence_length=length, device="cpu", dtype=torch.float32)
        return masked(*result) if isinstance(result, tuple) else masked(result)

    return run


def flux(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("FluxPipeline", text_encoder=model, text_encoder_2=model, tokenizer_2=tokenizer)
    object.__setattr__(found, "tokenizer_max_length", 77)
    return masked(found._get_t5_prompt_embeds(captions, max_sequence_length=512, device="cpu"))


def flux_clip(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("FluxPipeline", text_encoder=model, tokenizer=tokenizer, tokenizer_max_length=77)
    return [row[None].numpy() for row in found._get_clip_prompt_embeds(captions, device="cpu")]


def sd3(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    parts = {"text_encoder": model, "text_encoder_3": model, "tokenizer_3": tokenizer}
    found = pipe("StableDiffusion3Pipeline", tokenizer_max_length=77, **parts)
    return masked(found._get_t5_prompt_embeds(captions, max_sequence_length=256, device="cpu"))


def sd3_clip(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    both = {"text_encoder_2": None, "tokenizer_2": None}
    found = pipe("StableDiffusion3Pipeline", text_encoder=model, tokenizer=tokenizer, tokenizer_max_length=77, **both)
    return masked(found._get_clip_prompt_embeds(captions, device="cpu")[0])


def chroma(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("ChromaPipeline", text_encoder=model, tokenizer=tokenizer)
    return masked(*found._get_t5_prompt_embeds(captions, max_sequence_length=512, device="cpu"))


def auraflow(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("AuraFlowPipeline", text_encoder=model, tokenizer=tokenizer)
    return masked(found.encode_prompt(captions, do_classifier_free_guidance=False, device="cpu")[0])


def wan(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    module = importlib.import_module("diffusers.pipelines.wan.pipeline_wan")
    module.ftfy = importlib.import_module("ftfy")  # which it imports only where it was found at first
    found = pipe("WanPipeline", text_encoder=model, tokenizer=tokenizer)
    return masked(found._get_t5_prompt_embeds(captions, max_sequence_length=512, device="cpu"))


def prx(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    module = importlib.import_module("diffusers.pipelines.prx.pipeline_prx")
    tokenizer.model_max_length = 256
    parts = {"text_preprocessor": module.TextPreprocessor(), "tokenizer": tokenizer}
    found = pipe("PRXPipeline", text_encoder=model.get_encoder(), **parts)
    return masked(*found.encode_prompt(captions, "cpu", False)[:2])


def prx_pixel(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    config = {"_internal_dict": SimpleNamespace(prompt_max_tokens=256)}
    found = pipe("PRXPixelPipeline", text_encoder=model.language_model, tokenizer=tokenizer, **config)
    return masked(*found.encode_prompt(captions, "cpu", False)[:2])


def sana(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    import inspect

    found = pipe("SanaPipeline", text_encoder=model, tokenizer=tokenizer)
    instruction = inspect.signature(type(found).__call__).parameters["complex_human_instruction"].default
    options = {"do_classifier_free_guidance": False, "device": "cpu", "complex_human_instruction": instruction}
    return masked(*found.encode_prompt(captions, **options)[:2])


def sana_negative(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("SanaPipeline", text_encoder=model, tokenizer=tokenizer)
    return masked(*found.encode_prompt(["x"], negative_prompt="", device="cpu", complex_human_instruction=["x"])[2:])


def lumina2(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    system = recipes()["lumina2"]["settings"]["template"]["prefix"].removesuffix(" <Prompt Start> ")
    found = pipe("Lumina2Pipeline", text_encoder=model, tokenizer=tokenizer, system_prompt=system)
    if captions == [""]:
        return masked(*found.encode_prompt(["x"], negative_prompt="", device="cpu")[2:])
    return masked(*found.encode_prompt(captions, False, device="cpu")[:2])


def z_image(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("ZImagePipeline", text_encoder=model, tokenizer=tokenizer)
    return [rows.numpy() for rows in found.encode_prompt(list(captions), "cpu", False)[0]]


def klein(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("Flux2KleinPipeline", text_encoder=model, tokenizer=tokenizer)
    return masked(found.encode_prompt(captions, device="cpu")[0])


def ovis(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    system = recipes()["ovis-image"]["settings"]["template"]["prefix"]
    parts = {"system_prompt": system, "user_prompt_begin_id": 28}
    found = pipe("OvisImagePipeline", text_encoder=model, tokenizer=tokenizer, **parts)
    return masked(found.encode_prompt(captions, device="cpu")[0])


def ernie(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    tokenizer.model_max_length = 700
    found = pipe("ErnieImagePipeline", text_encoder=model, tokenizer=tokenizer)
    return [rows.numpy() for rows in found.encode_prompt(captions, "cpu")]


def hunyuan_video(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    module = importlib.import_module("diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video")
    found = pipe("HunyuanVideoPipeline", text_encoder=model, tokenizer=tokenizer)
    options = {"device": "cpu", "max_sequence_length": 700}
    return masked(*found._get_llama_prompt_embeds(captions, module.DEFAULT_PROMPT_TEMPLATE, **options))


def hidream_llama(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    model.set_attn_implementation("eager")  # the pipeline asks for attentions, which SDPA does not have
    found = pipe("HiDreamImagePipeline", text_encoder_4=model, tokenizer_4=tokenizer)
    stacked = found._get_llama3_prompt_embeds(captions, device="cpu")  # (layers, B, L, D)
    return masked(stacked.permute(1, 2, 0, 3).flatten(2))


def hidream_t5(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("HiDreamImagePipeline", text_encoder_3=model, tokenizer_3=tokenizer)
    return masked(found._get_t5_prompt_embeds(captions, device="cpu"))


def cogview4(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("CogView4Pipeline", text_encoder=model, tokenizer=tokenizer)
    return masked(found._get_glm_embeds(captions, max_sequence_length=700, device="cpu"))


def fibo(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("BriaFiboPipeline", text_encoder=model, tokenizer=tokenizer)
    return masked(found.get_prompt_embeds(captions, device=torch.device("cpu"), max_sequence_length=700)[0])


def ltx2(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("LTX2Pipeline", text_encoder=model, tokenizer=tokenizer)
    return masked(*found._get_gemma_prompt_embeds(captions, device="cpu", max_sequence_length=700))


def qwen_image(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    prefix, suffix = (recipes()["qwen-image"]["settings"]["template"][part] for part in ("prefix", "suffix"))
    parts = {"prompt_template_encode": f"{prefix}{{}}{suffix}", "prompt_template_encode_start_idx": 34}
    found = pipe("QwenImagePipeline", text_encoder=model, tokenizer=tokenizer, tokenizer_max_length=1024, **parts)
    return masked(*found.encode_prompt(captions, device="cpu", max_sequence_length=512))


def hunyuan_image(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("HunyuanImagePipeline")
    return masked(*found._get_qwen_prompt_embeds(tokenizer, model, captions, device="cpu"))


def krea2(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    template = recipes()["krea2"]["settings"]["template"]
    suffix = template["suffix_after_pads"]
    parts = {"prompt_template_encode_prefix": template["prefix"], "prompt_template_encode_suffix": suffix}
    count = len(tokenizer(suffix)["input_ids"])
    parts |= {"prompt_template_encode_start_idx": 34, "prompt_template_encode_num_suffix_tokens": count}
    found = pipe("Krea2Pipeline", text_encoder=model, tokenizer=tokenizer, **parts)
    object.__setattr__(found, "text_encoder_select_layers", tuple(range(2, 36, 3)))
    states, mask = found.encode_prompt(captions, "cpu")[:2]
    return masked(states.flatten(2), mask)


def ideogram4(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    found = pipe("Ideogram4Pipeline", text_encoder=model, tokenizer=tokenizer)
    embeddings = found.encode_prompt(captions, 1, 1, 700, "cpu")[0]
    lengths = [int(rows.any(-1).sum()) for rows in embeddings]
    return [rows[700 - n : 700].numpy() for rows, n in zip(embeddings, lengths, strict=True)]


def dreamlite(model: Any, tokenizer: Any, captions: list[str]) -> Rows:
    prefix, suffix = (recipes()["dreamlite"]["settings"]["template"][part] for part in ("prefix", "suffix"))
    parts = {"prompt_template_encode_generate": f"{prefix}{{}}{suffix}"}
    parts |= {"prompt_template_encode_generate_start_idx": 34}
    found = pipe("DreamLitePipeline", text_encoder=model, tokenizer=tokenizer, **parts)
    return masked(*found.encode_prompt("generate", captions, "cpu", torch.float32)[:2])


_T5 = {"make": t5(), "model_class": "T5EncoderModel"}
_MOCHI = {"_internal_dict": SimpleNamespace(force_zeros_for_empty_prompt=False)}
_GEMMA2 = {"query_pre_attn_scalar": 16, "sliding_window": 4096}
CASES: dict[str, Case] = {
    "deepfloyd-if": Case(reference=deepfloyd, **_T5),
    "pixart-sigma": Case(reference=pixart, **_T5),
    "flux1": Case(reference=flux, **_T5),
    "flux1-clip": Case(clip, flux_clip, "CLIPTextModel", on_one_line=True),
    "sd3": Case(reference=sd3, **_T5),
    "sd3-clip-l": Case(clip, sd3_clip, "CLIPTextModelWithProjection"),
    "chroma": Case(reference=chroma, **_T5),
    "auraflow": Case(t5("UMT5"), auraflow, "UMT5EncoderModel"),
    "mochi": Case(reference=t5_part("MochiPipeline", 256, **_MOCHI), alone=True, on_one_line=True, **_T5),
    "ltx": Case(reference=t5_part("LTXPipeline", 128), **_T5),
    "wan": Case(t5("UMT5"), wan, "UMT5EncoderModel"),
    "prx": Case(t5gemma, prx, "T5GemmaModel"),
    "prx-pixel": Case(vision_language("Qwen3VL"), prx_pixel),
    "sana": Case(decoder("Gemma2", "<s> $A", **_GEMMA2), sana, empty=sana_negative),
    "lumina2": Case(decoder("Gemma2", "<s> $A", **_GEMMA2), lumina2),
    "z-image": Case(decoder("Qwen3"), z_image),
    "flux2-klein": Case(decoder("Qwen3", layers=28), klein),
    "ovis-image": Case(decoder("Qwen3"), ovis),
    "ernie-image": Case(mistral3, ernie, settings=SHORT),
    "hunyuan-video": Case(decoder("Llama", "<s> $A"), hunyuan_video, settings=SHORT),
    "hidream-llama": Case(decoder("Llama", "<s> $A"), hidream_llama),
    "hidream-t5": Case(reference=hidream_t5, **_T5),
    "cogview4": Case(decoder("Glm", "<s> $A"), cogview4, settings=SHORT, alone=True),
    "fibo": Case(decoder("SmolLM3", vocab_size=128_064), fibo, settings=SHORT, alone=True),
    "ltx2": Case(decoder("Gemma3Text", "<s> $A"), ltx2, settings=SHORT),
    "qwen-image": Case(vision_language("Qwen2_5_VL"), qwen_image),
    "hunyuan-image": Case(vision_language("Qwen2_5_VL"), hunyuan_image),
    "krea2": Case(vision_language("Qwen3VL", layers=36), krea2),
    "ideogram4": Case(vision_language("Qwen3VL", layers=36), ideogram4, settings=SHORT),
    "dreamlite": Case(vision_language("Qwen3VL"), dreamlite),
}
"""Every recipe that is compared; the ones of one network share the class of their model."""
