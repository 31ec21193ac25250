"""Runs tasks one after another in this process: for debugging with breakpoints, and for quick tests."""

from collections import deque
from dataclasses import replace

from pipeline.executors.base import Executor
from pipeline.executors.task import TaskOutcome, TaskRequest, release_stages, run_task
from pipeline.stage import Stage
from pipeline.storage.run_folder import RunFolder


class InlineExecutor(Executor):
    """No parallelism and no other process; the same tasks give the same results."""

    window = 1

    def __init__(self, run: RunFolder):
        self.run = run
        self.queue: deque[tuple[Stage, TaskRequest]] = deque()

    def submit(self, stage: Stage, request: TaskRequest) -> None:
        self.queue.append((stage, replace(request, limit_s=None)))  # it would end this process

    @property
    def num_tasks(self) -> int:
        return len(self.queue)

    def wait(self, timeout_s: float) -> list[TaskOutcome]:
        stage, request = self.queue.popleft()
        return [run_task(stage, self.run, request)]

    def withdraw(self) -> None:
        self.queue.clear()

    def close(self) -> None:
        self.withdraw()
        release_stages()
