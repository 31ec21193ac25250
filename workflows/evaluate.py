"""evaluate: captions -> cascade -> images -> features -> metrics."""

from collections.abc import Mapping

from pipeline.job import Job, JobWorkflow
from pipeline.storage.run_folder import RunFolder
from stages.evaluation.config import EvaluateConfig
from stages.evaluation.report import TABLE
from stages.evaluation.run import evaluate
from stages.sampling.dry_run import sampling_plan


class Evaluate(JobWorkflow):
    """Evaluates images, and samples them first if the configuration says so."""

    name = "evaluate"
    summary = "sample images of a caption set, and evaluate them: Frechet and kernel distance, CLIP score"
    config_class = EvaluateConfig
    config: EvaluateConfig

    def work(self, job: Job) -> Mapping[str, object]:
        return evaluate(self.config, job)

    def dry_run(self) -> Mapping[str, object]:
        plan = {} if self.config.sample is None else sampling_plan(self.config.sample)
        return {**plan, "guidance": list(self.config.guidance), "samplings": max(1, len(self.config.guidance))}

    def next_steps(self, run: RunFolder) -> list[tuple[str, str]]:
        return [("table", f"{run.url}/{TABLE}")] if run.storage.size(TABLE) is not None else []
