"""A small CLIP, built from its configuration and trained on the demo's scenes for some minutes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from stages.sources.synthetic.scenes import Scene, render, scene
from tests.word_tokenizer import write_word_tokenizer

IMAGE_PX = 32
DIM = 64
_SEED = 11  # of the scenes it learns from; precompute uses other ones


def train_small_clip(folder: Path, *, num_scenes: int = 8000, num_steps: int = 2400, batch_size: int = 128) -> float:
    """Trains with CLIP's own loss (Radford et al. 2021, arXiv 2103.00020, figure 3) and saves as transformers does.

    Returns:
        Part of the images of the last mixed batches whose own caption is the likeliest of the batch, in [0, 1].
    """
    from transformers import CLIPModel

    torch.manual_seed(0)
    tokenizer = write_word_tokenizer(folder, template="<unk> $A </s>")
    model = CLIPModel(_config(len(tokenizer)))
    scenes = [scene(_SEED, index, "train") for index in range(num_scenes)]
    captions = [s.captions[0] for s in scenes]
    images = torch.from_numpy(np.stack([render(s, IMAGE_PX) for s in scenes])).permute(0, 3, 1, 2)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=num_steps, pct_start=0.1)
    generator, right = torch.Generator().manual_seed(0), []
    # One batch of three is of any scenes, one of one colour and shape, one of one colour and place: else the colours
    # alone would tell most captions of a batch apart, and the embeddings would leave out the rest.
    kinds = ([torch.arange(num_scenes)], _alike(scenes, "color", "shape"), _alike(scenes, "color", "position"))
    for step in range(num_steps):
        kind = kinds[step % len(kinds)]
        group = kind[step // len(kinds) % len(kind)]
        rows = group[torch.randperm(len(group), generator=generator)[:batch_size]]
        tokens = tokenizer([captions[row] for row in rows.tolist()], padding=True, return_tensors="pt")
        pixels = (images[rows].float() / 255 - mean) / std
        logits = model(pixel_values=pixels, **tokens).logits_per_image
        own = torch.arange(len(rows))
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if kind is kinds[0]:
            right.append(float((logits.argmax(dim=1) == own).float().mean()))
        if step % 60 == 0:
            print(f"CLIP step {step}: loss {loss.item():.3f}, own caption first {right[-1]:.1%}", flush=True)
    model.save_pretrained(folder)
    return float(np.mean(right[-20:]))


def _alike(scenes: Sequence[Scene], *parts: str) -> list[torch.Tensor]:
    """Rows of the scenes whose first objects are alike in these parts."""
    found: dict[tuple[str, ...], list[int]] = {}
    for row, each in enumerate(scenes):
        found.setdefault(tuple(getattr(each.objects[0], part) for part in parts), []).append(row)
    return [torch.tensor(rows) for _, rows in sorted(found.items())]


def _config(vocabulary: int):
    from transformers import CLIPConfig

    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192}
    shape["projection_dim"] = DIM
    text = {**shape, "vocab_size": vocabulary, "max_position_embeddings": 32, "eos_token_id": 1, "bos_token_id": 2}
    vision = {**shape, "image_size": IMAGE_PX, "patch_size": 8}
    return CLIPConfig(text_config={**text, "pad_token_id": 0}, vision_config=vision, projection_dim=DIM)
