"""likelihood: store and a trained stage -> bits per dimension of the store's images."""

from collections.abc import Mapping

from pipeline.job import Job, JobWorkflow
from pipeline.storage.run_folder import RunFolder
from stages.evaluation.likelihood import LikelihoodConfig, likelihood_plan, measure


class Likelihood(JobWorkflow):
    """Measures how likely stored images are under a trained stage."""

    name = "likelihood"
    summary = "bits per dimension of a store's images under a trained stage"
    config_class = LikelihoodConfig
    config: LikelihoodConfig

    def work(self, job: Job) -> Mapping[str, object]:
        return measure(self.config, job)

    def dry_run(self) -> Mapping[str, object]:
        return likelihood_plan(self.config)

    def next_steps(self, run: RunFolder) -> list[tuple[str, str]]:
        return [("by image", f"{run.url}/batches")]
