"""What a sampling would do: shown by `--dry-run`."""

from collections.abc import Mapping

from stages.sampling.cascade import load_cascade
from stages.sampling.config import SampleConfig
from stages.sampling.inputs import check_init
from stages.sampling.requests import process_share, resolve_requests
from stages.sampling.shapes import with_shapes


def sampling_plan(config: SampleConfig) -> Mapping[str, object]:
    """Images, sizes, height and width of those that are not square, parameters; nothing is generated."""
    loaded = load_cascade(config.stages, config.output.size_px)
    cascade = loaded.cascade
    check_init(config.init, cascade.stages[0])
    share, num_shares = process_share(config.part)
    requests = with_shapes(resolve_requests(config), config, cascade)
    return {
        "images": len(requests),
        "images_of_this_process": len(requests[share::num_shares]),
        "sizes_px": cascade.sizes_px,
        "shapes_of_last_stage": [
            list(cascade.shapes(shape)[-1]) for shape in dict.fromkeys(each.shape for each in requests) if shape
        ],
        "parameters": sum(
            p.numel()
            for stage in cascade.stages
            for model in (stage.denoiser, stage.guide)
            if model is not None
            for p in model.parameters()
        ),
        "sampling_steps": sum(stage.sampling.num_steps for stage in cascade.stages),
        "checkpoint_steps": [checkpoint.step for checkpoint in loaded.checkpoints],
    }
