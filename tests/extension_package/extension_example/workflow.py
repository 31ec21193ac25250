"""`pipeline run word-counts`: how often each word is in the captions of a store."""

from collections import Counter
from collections.abc import Mapping

from imagen_core.store import Store
from pipeline.config import Config
from pipeline.job import Job, JobWorkflow


class WordCountsConfig(Config):
    """What to count."""

    store: str
    """Store folder or URL."""


class WordCounts(JobWorkflow):
    """Counts words."""

    name = "word-counts"
    summary = "count the words of a store's captions"
    config_class = WordCountsConfig
    config: WordCountsConfig

    def work(self, job: Job) -> Mapping[str, object]:
        captions = (caption for sample in Store.open(self.config.store) for caption in sample.captions)
        counts = Counter(word for caption in captions for word in caption.split())
        job.run.storage.write_json("words.json", dict(counts))
        return {"words": sum(counts.values()), "distinct_words": len(counts)}

    def dry_run(self) -> Mapping[str, object]:
        return {"samples": len(Store.open(self.config.store))}
