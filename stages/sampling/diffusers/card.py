"""README.md of an exported cascade, as a model card of the Hugging Face hub."""

from collections.abc import Sequence

from imagen_core.cascade import CascadeStage
from imagen_core.train import LoadedDenoiser
from stages.sampling.diffusers.encoder import ExportedEncoder

_HEAD = """\
---
license: unknown
library_name: diffusers
pipeline_tag: text-to-image
tags: [diffusion, cascade]
---

# {title}

A cascade of pixel diffusion models, exported from imagen-precompute. It needs torch, diffusers and transformers; the
code is in `pipeline.py`, `cascade_sampling.py` and `network.py`, which `trust_remote_code=True` runs, so read them
first.

The licence above is to be filled in by whoever publishes the model.

```python
{usage}
```
"""
_USAGE = """\
from diffusers import DiffusionPipeline
{imports}
pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
images = pipe({call}).images
images[0].save("image.png")"""
_FILES = """
- `stage_N/diffusion_pytorch_model.safetensors` has the weights under their names in training; `config.json` the
  operations of the network, one per line, and under `sampling` how it samples: `table` is what the sampler adds up at
  each step.
- The number of steps, the sampler and the threshold are fixed: export again for others. `guidance_scale`, `height` and
  `width` may be given.
- The same `seed` and embeddings give the images of `pipeline run sample`, up to rounding.
- With `dtype=torch.bfloat16` or `torch.float16` (`torch_dtype` in older versions of diffusers) convolutions and other
  products run in that type, and all else in float32.
- `save_pretrained` does not copy the code; copy or upload this folder instead.
"""


def model_card(stages: Sequence[CascadeStage], checkpoints: Sequence[LoadedDenoiser], encoder: ExportedEncoder) -> str:
    """The text of README.md."""
    rows = ["| stage | images | parameters | weights | sampler | guidance |", "|---|---|---|---|---|---|"]
    for number, (stage, checkpoint) in enumerate(zip(stages, checkpoints, strict=True), 1):
        count = sum(parameter.numel() for parameter in stage.denoiser.parameters())
        low_res = stage.config.low_res_px
        images = f"{stage.size_px} px" if low_res is None else f"{low_res} -> {stage.size_px} px"
        settings = stage.sampling
        weights = ", ".join(
            f"{name} {getattr(settings.guidance, name):g}"
            for name in ("text", "labels", "low_res")
            if name in stage.conditions
        )
        rows.append(
            f"| {number} | {images} | {count:,} | {checkpoint.weights} of step {checkpoint.step:,} | "
            f"{getattr(settings.sampler, 'kind', '')}, {settings.num_steps} steps | {weights} |"
        )
    usage = _usage(stages, encoder)
    title = f"Images of {stages[-1].size_px} px"
    return _HEAD.format(title=title, usage=usage) + "\n" + "\n".join(rows) + f"\n\n{encoder.remark}\n" + _FILES


def _usage(stages: Sequence[CascadeStage], encoder: ExportedEncoder) -> str:
    """The example of the card."""
    reads = {condition for stage in stages for condition in stage.conditions}
    arguments: list[str] = []
    if "text" in reads:
        encodes = bool(encoder.components) or "encoder_model" in encoder.settings
        arguments.append('["a red fox in the snow"]' if encodes else "prompt_embeds=EMBEDDINGS")
    if "labels" in reads:
        arguments.append("labels=[0]")
    imports = ""
    if "low_res" in stages[0].conditions:
        imports = "from PIL import Image\n"
        arguments.append('image=[Image.open("small.png")]')
    return _USAGE.format(imports=imports, call=", ".join([*arguments, "seed=0"]))
