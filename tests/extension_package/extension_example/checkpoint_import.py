"""`pipeline import plain`: a folder with denoiser.json and weights.safetensors becomes a checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.commands import CommandResult
from pipeline.errors import ConfigError
from stages.checkpoints.imported import ImportedStage, new_folder, t5_facts, write_stages

MAX_TOKENS = 64


def import_plain(paths: Sequence[str], *, out: str, encoder_model: str | None = None) -> CommandResult:
    """Writes `OUT/unet-0` with a checkpoint, and `OUT/sample.yaml`."""
    from safetensors.torch import load_file

    from imagen_core.diffusion import DenoiserConfig

    if len(paths) != 1:
        raise ConfigError(f"give one folder (got {len(paths)} paths)")
    folder, target = Path(paths[0]), new_folder(out)
    config = DenoiserConfig.model_validate(json.loads((folder / "denoiser.json").read_text(encoding="utf-8")))
    stage = ImportedStage(
        source=str(folder),
        config=config,
        sampling={"sampler": {"kind": "relaxed_euler"}, "num_steps": 2},
        max_tokens=MAX_TOKENS,
        network=lambda: load_file(folder / "weights.safetensors"),
    )
    encoder = t5_facts(encoder_model or "google-t5/t5-small", MAX_TOKENS, config.unet.text_dim)
    return write_stages(target, [stage], encoder)
