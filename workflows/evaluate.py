"""evaluate: captions -> cascade -> images -> features -> metrics."""

from collections.abc import Mapping

from pipeline.job import Job, JobWorkflow
from pipeline.storage.run_folder import RunFolder
from stages.evaluation.config import EvaluateConfig
from stages.evaluation.report import TABLE
from stages.evaluation.run import evaluate
from stages.sampling.dry_run import sampling_facts


class Evaluate(JobWorkflow):
    """Judges images, and draws them first if asked."""

    name = "evaluate"
    summary = "draw images of a caption set, and judge them: Frechet and kernel distance, CLIP score"
    config_class = EvaluateConfig
    config: EvaluateConfig

    def work(self, job: Job) -> Mapping[str, object]:
        return evaluate(self.config, job)

    def dry_run(self) -> Mapping[str, object]:
        drawing = {} if self.config.draw is None else sampling_facts(self.config.draw)
        return {**drawing, "guidance": list(self.config.guidance), "times_drawn": max(1, len(self.config.guidance))}

    def next_steps(self, run: RunFolder) -> list[tuple[str, str]]:
        return [("table", f"{run.url}/{TABLE}")] if run.storage.size(TABLE) is not None else []
