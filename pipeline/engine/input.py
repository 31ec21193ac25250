"""Records the input of a run, before its first shard is made."""

from pipeline.engine.retries import retry_origins
from pipeline.engine.state import RunState


def record_input(state: RunState) -> None:
    """Records new input, once all committed shards are known to fit.

    Raises:
        StaleOutputError: committed shards were made from other input, and `restart` is off; nothing was recorded.
    """
    source, restart = state.plan.input, state.ledger.restart
    if source is None:
        return
    if not restart and source.has_new_input():
        _refuse_unfit(state)
    source.record(restart=restart)


def _refuse_unfit(state: RunState) -> None:
    """Checks the shards up to the last committed one."""
    committed = set(state.run.recorded_shards(state.plan.row_group)) - retry_origins(state.run).keys()
    if not committed:
        return
    for shard, _ in state.ledger.finished(state.plan.shards(), read_only=True):
        committed.discard(shard.index)
        if not committed:
            return
    state.ledger.check_leftovers()
