"""sample: prompts -> text encoder -> cascade -> pictures."""

from collections.abc import Mapping

from pipeline.job import Job, JobWorkflow
from pipeline.runfolder import RunFolder
from stages.sample import draw
from stages.sample_cascade import load_cascade
from stages.sample_config import SampleConfig
from stages.sample_pictures import pictures_to_draw


class Sample(JobWorkflow):
    """Draws pictures from prompts with trained stages."""

    name = "sample"
    summary = "draw pictures from prompts with a trained cascade, or enlarge pictures"
    config_class = SampleConfig
    config: SampleConfig

    def work(self, job: Job) -> Mapping[str, object]:
        return draw(self.config, job)

    def facts(self) -> Mapping[str, object]:
        cascade, origins = load_cascade(self.config)
        return {
            "pictures": len(pictures_to_draw(self.config)),
            "sizes_px": cascade.sizes_px,
            "parameters": sum(p.numel() for stage in cascade.stages for p in stage.denoiser.parameters()),
            "network_calls": sum(stage.sampling.num_steps for stage in cascade.stages),
            "checkpoint_steps": [origin["step"] for origin in origins],
        }

    def closing_words(self, run: RunFolder) -> list[tuple[str, str]]:
        return [("grid", f"{run.url}/grid.png")]
