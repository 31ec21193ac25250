"""`--retry-dropped REASON` for captions: asks again about rows that got no good caption, and about no others."""

import json
from collections import Counter
from collections.abc import Collection, Sequence

from imagen_core.store import MANIFEST_NAME, read_captions, read_samples
from pipeline.engine.retries import ALL
from pipeline.storage.record import Record, shard_name
from pipeline.storage.run_folder import STORE, RunFolder
from stages.captioners.answers import AnswerLog, delete_answers
from stages.captioners.base import attempt_of
from stages.precompute.captioning.make import TRIED, USED, MakeCaptionsStage, identity_file, log_identity
from stages.precompute.fetch import SAMPLES


def retry_captions(run: RunFolder, stages: Sequence[MakeCaptionsStage], reasons: Sequence[str]) -> Counter[str]:
    """Deletes the shards of sets with rows that got no caption for one of `reasons` (or `all`); what they have is kept
    in the run folder, with which rows are asked about again.

    Returns:
        How many rows are asked about again, by reason.
    """
    chosen: Counter[str] = Counter()
    for stage in stages:
        for record in list(run.records(stage.group)):
            found = {reason: n for reason, n in record.drops.items() if reason in reasons or ALL in reasons}
            if found:
                _begin_again(run, stage, record, found.keys())
                chosen.update(found)
    return chosen


def _begin_again(run: RunFolder, stage: MakeCaptionsStage, record: Record, reasons: Collection[str]) -> None:
    name, captioner = shard_name(record.shard), stage.captioner
    samples_file = run.committed_file(SAMPLES, name)
    copies = [run.proven_copy(file) for file in (record.file, samples_file)]
    try:
        rows, samples = read_captions(copies[0]), read_samples(copies[1])
    finally:
        for copy in copies:
            run.storage.release(copy)
    kept = run.storage.read_json(identity_file(captioner.name))
    delete_answers(run, captioner.name, {record.shard})
    log = AnswerLog(run, captioner.name, name, log_identity(stage.groups[0], kept["model"], samples_file.sha256))
    try:
        log.write({"used": {counter: record.counters.get(counter, 0) for counter in USED}})
        for row, found in enumerate(rows):
            if found.captions and found.seeds:
                attempt = attempt_of(captioner.seed, samples[row].key, found.seeds[0]) or 0  # 0 of one that was erased
                log.write({"row": row, "good": [found.captions[0], found.finish_reasons[0], attempt]})
        for line in run.storage.read_lines(run.drops_name(stage.group, name)):
            drop = json.loads(line)
            tried = record.info[TRIED][str(drop["row"])]
            again = {"first_attempt": tried} if drop["reason"] in reasons else {}
            log.write({"row": drop["row"], **(again or {"bad": [drop["reason"], drop["detail"], tried]})})
    finally:
        log.close()
    run.storage.delete(f"{STORE}/{MANIFEST_NAME}", durably=True)
    run.delete_shard(stage.group, name)
