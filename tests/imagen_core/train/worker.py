"""The processes of a training, started by the tests.

    python -m tests.imagen_core.train.worker JOBS.json [SIZE FILE]

JOBS.json lists runs: {"config": {...}, "out": path, "stop_at", "poison" or "unreadable": step}. They run one
after the other in one process group; {"wait_for": path} waits for a file. Each writes out/rank-R.json: the keys of its
batches, and the error if there was one. With SIZE the process forks until there are so many, which import torch only
once; without it the process group is left to the trainer (torchrun).
"""

import atexit
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from imagen_core.train import TrainConfig, TrainError, train, trainer
from imagen_core.train.data.stream import Batch, BatchStream


def run(job: dict[str, Any], rank: int) -> None:
    """One training; what happened goes to a file."""
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    keys: list[list[str]] = []
    steps = 0

    class Recording(BatchStream):
        def next(self) -> Batch:
            batch = super().next()
            keys.append(batch.keys)
            if job.get("poison") == len(keys) and rank == 0:
                batch.images[16] = batch.images[16].float() * torch.nan
            if job.get("unreadable") == len(keys) and rank == 1:
                batch = replace(batch.part(0, 0), error=ConnectionError("the store is far away"))
            return batch

    def should_stop() -> bool:
        nonlocal steps
        steps += 1
        return rank == 0 and job.get("stop_at") == steps

    report: dict[str, Any] = {"error": None, "summary": None}
    plain, trainer.BatchStream = trainer.BatchStream, Recording
    try:
        report["summary"] = train(TrainConfig.model_validate(job["config"]), out, should_stop=should_stop)
    except TrainError as error:
        report["error"] = f"{type(error).__name__}: {error}"
    finally:
        trainer.BatchStream = plain
    written = out / f"rank-{rank}.tmp"
    written.write_text(json.dumps(report | {"keys": keys}), encoding="utf-8")
    written.rename(out / f"rank-{rank}.json")


def forked_rank(size: int) -> int:
    """Forks `size - 1` processes; the rank of this one. Rank 0 exits with 1 if another one fails."""
    for rank in range(1, size):
        child = os.fork()
        if child == 0:
            return rank
        atexit.register(_wait_for, child)
    return 0


def _wait_for(child: int) -> None:
    if os.waitpid(child, 0)[1] != 0:
        os._exit(1)


def main() -> None:
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rank = int(os.environ.get("RANK", "0"))
    if len(sys.argv) > 2:
        size = int(sys.argv[2])
        rank = forked_rank(size)
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=size)
    for job in jobs:
        if "wait_for" in job:
            while not Path(job["wait_for"]).exists():
                time.sleep(0.02)
        else:
            run(job, rank)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
