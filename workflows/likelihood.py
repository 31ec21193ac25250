"""likelihood: store and a trained stage -> bits a dimension of the store's images."""

from collections.abc import Mapping

from pipeline.job import Job, JobWorkflow
from pipeline.storage.run_folder import RunFolder
from stages.evaluation.likelihood import LikelihoodConfig, likelihood_facts, measure


class Likelihood(JobWorkflow):
    """Measures how likely a trained stage finds stored images."""

    name = "likelihood"
    summary = "bits a dimension of a store's images under a trained stage"
    config_class = LikelihoodConfig
    config: LikelihoodConfig

    def work(self, job: Job) -> Mapping[str, object]:
        return measure(self.config, job)

    def dry_run(self) -> Mapping[str, object]:
        return likelihood_facts(self.config)

    def next_steps(self, run: RunFolder) -> list[tuple[str, str]]:
        return [("by image", f"{run.url}/batches")]
