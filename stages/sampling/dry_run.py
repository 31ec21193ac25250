"""What a sampling would do: shown by `--dry-run`."""

from collections.abc import Mapping

from stages.sampling.cascade import load_cascade
from stages.sampling.config import SampleConfig
from stages.sampling.requests import my_part, resolve_requests


def sampling_facts(config: SampleConfig) -> Mapping[str, object]:
    """Images, sizes, parameters; nothing is drawn."""
    loaded = load_cascade(config)
    cascade = loaded.cascade
    index, count = my_part(config)
    images = resolve_requests(config)
    return {
        "images": len(images),
        "images_of_this_process": len(images[index::count]),
        "sizes_px": cascade.sizes_px,
        "parameters": sum(p.numel() for stage in cascade.stages for p in stage.denoiser.parameters()),
        "sampling_steps": sum(stage.sampling.num_steps for stage in cascade.stages),
        "checkpoint_steps": [checkpoint.step for checkpoint in loaded.checkpoints],
    }
