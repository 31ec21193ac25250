"""The state of a run: its plan and its run folder, with what both together determine."""

from collections.abc import Callable
from dataclasses import replace

from pipeline.engine.ledger import Ledger
from pipeline.engine.retries import Retries
from pipeline.plan import Plan
from pipeline.storage.run_folder import RunFolder


class RunState:
    """What the runner, the scheduler and the survey share; each part is made once per run.

    Attributes:
        plan: its stream of shards is followed by the shards of the retry rounds.
        run: the run folder.
        retries: the rows that are tried again.
        ledger: the finished work.
    """

    def __init__(self, plan: Plan, run: RunFolder, *, restart: bool = False):
        """
        Args:
            restart: make work that no longer fits the plan again, instead of refusing it.
        """
        run.transient_groups, run.folders = plan.transient_groups, plan.folders
        self.run = run
        self.retries = Retries(plan, run)
        self.plan = replace(plan, shards=self.retries.all_shards)
        self.ledger = Ledger(self.plan, run, restart=restart)

    @classmethod
    def open(cls, out: str, make_plan: Callable[[RunFolder], Plan], *, restart: bool = False) -> "RunState":
        """The state of the run in folder `out`."""
        run = RunFolder(out)
        return cls(make_plan(run), run, restart=restart)
