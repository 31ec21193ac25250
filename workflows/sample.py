"""sample: prompts -> text encoder -> cascade -> images."""

from collections.abc import Mapping

from pipeline.job import Job, JobWorkflow
from pipeline.storage.run_folder import RunFolder
from stages.sampling.config import SampleConfig
from stages.sampling.dry_run import sampling_facts
from stages.sampling.run import draw


class Sample(JobWorkflow):
    """Draws images from prompts with trained stages."""

    name = "sample"
    summary = "draw images from prompts with a trained cascade, or enlarge images"
    config_class = SampleConfig
    config: SampleConfig

    def work(self, job: Job) -> Mapping[str, object]:
        return draw(self.config, job)

    def dry_run(self) -> Mapping[str, object]:
        return sampling_facts(self.config)

    def next_steps(self, run: RunFolder) -> list[tuple[str, str]]:
        return [("grid", f"{run.url}/grid.png")]
