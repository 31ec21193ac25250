"""evaluate: captions -> cascade -> images -> features -> metrics."""

from collections.abc import Mapping

from pipeline.job import Job, JobWorkflow
from pipeline.storage.run_folder import RunFolder
from stages.evaluation.config import EvaluateConfig
from stages.evaluation.report import TABLE
from stages.evaluation.run import evaluate
from stages.evaluation.sweep import sweep
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
        points = sweep(self.config)
        plan = {} if self.config.sample is None else sampling_plan(points[0].with_weights(self.config.sample))
        more = {name: list(values) for name in ("sigma_rel", "autoguidance") if (values := getattr(self.config, name))}
        return {**plan, "guidance": list(self.config.guidance), **more, "samplings": len(points)}

    def next_steps(self, run: RunFolder) -> list[tuple[str, str]]:
        return [("table", f"{run.url}/{TABLE}")] if run.storage.size(TABLE) is not None else []
