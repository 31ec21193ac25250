"""Fixes what the input of a run is, before its first shard is made."""

from pipeline.engine.ledger import Ledger
from pipeline.engine.retries import retry_origins
from pipeline.plan import Plan
from pipeline.storage.run_folder import RunFolder


def fix_input(plan: Plan, run: RunFolder, *, restart: bool) -> None:
    """Notes what is new in the input, once all that is committed is known to fit.

    Raises:
        StaleOutputError: committed shards were made from other input, and `restart` is off; nothing was noted.
    """
    if plan.input is None:
        return
    if not restart and plan.input.has_new_input():
        _refuse_unfit(plan, run)
    plan.input.record(restart=restart)


def _refuse_unfit(plan: Plan, run: RunFolder) -> None:
    """Looks at the shards up to the last committed one."""
    ledger = Ledger(plan, run, read_only=True)
    committed = set(run.recorded_shards(plan.row_group)) - retry_origins(run).keys()
    if not committed:
        return
    for shard, _ in ledger.finished(plan.shards()):
        committed.discard(shard.index)
        if not committed:
            return
    ledger.check_leftovers()
