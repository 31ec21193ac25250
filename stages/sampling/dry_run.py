"""What a sampling would do: shown by `--dry-run`."""

from collections.abc import Mapping

from stages.sampling.cascade import load_cascade
from stages.sampling.config import SampleConfig
from stages.sampling.requests import process_share, resolve_requests


def sampling_plan(config: SampleConfig) -> Mapping[str, object]:
    """Images, sizes, parameters; nothing is generated."""
    loaded = load_cascade(config.stages, config.output.size_px)
    cascade = loaded.cascade
    share, num_shares = process_share(config.part)
    requests = resolve_requests(config)
    return {
        "images": len(requests),
        "images_of_this_process": len(requests[share::num_shares]),
        "sizes_px": cascade.sizes_px,
        "parameters": sum(p.numel() for stage in cascade.stages for p in stage.denoiser.parameters()),
        "sampling_steps": sum(stage.sampling.num_steps for stage in cascade.stages),
        "checkpoint_steps": [checkpoint.step for checkpoint in loaded.checkpoints],
    }
