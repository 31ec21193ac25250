"""What the Ray executor asks of a cluster, and what it does when the cluster changes."""

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest

from pipeline.errors import MachineError, PreemptedError, ShardError
from pipeline.executors import ray as ray_executor
from pipeline.executors import ray_head
from pipeline.executors.base import ExecutionConfig
from pipeline.executors.inline import InlineExecutor
from pipeline.executors.ray import RayExecutor
from pipeline.executors.ray_cluster import ClusterNode, connect, leave
from pipeline.executors.ray_head import HeadWatch
from pipeline.executors.ray_nodes import SeeingNodes
from pipeline.executors.ray_pool import RayWorker, WorkerPool, node_id
from pipeline.executors.task import TaskOutcome, TaskRequest
from pipeline.options import RunOptions
from pipeline.stage import Resources, Shard
from pipeline.storage.record import CommittedFile, Record
from pipeline.storage.run_folder import RunFolder
from tests.pipeline.executors.cluster import open_ports
from tests.pipeline.toy import Cube, Fetch, Toy, ToyConfig, ToyOptions
from tests.processes import descendants

CPU_NODE = ClusterNode("cpu", {"CPU": 8.0, "cpu_node": 1.0})
GPU_NODE = ClusterNode("gpu", {"CPU": 4.0, "GPU": 2.0, "accelerator_type:H100": 1.0})


def stage(**resources: Any) -> Cube:
    made = Cube(ToyOptions())
    made.resources = Resources(**resources)
    made.max_workers = 0
    return made


def pool(limit: int, tmp_path: Path) -> WorkerPool:
    made = WorkerPool(stage(), RunFolder(tmp_path), {}, mock.Mock(), None)
    made.limit = limit
    return made


def give(pool: WorkerPool, *indices: int, alone: bool = False) -> list[Any]:
    pool.waiting.extend(
        TaskRequest("cube", Shard(i, [], 0), frozenset(["cubes"]), {"cubes": ""}, alone=alone) for i in indices
    )
    return pool.feed()


def executor(tmp_path: Path, *stages: Any, address: str | None = "auto", **config: Any) -> RayExecutor:
    return RayExecutor(stages, RunFolder(tmp_path), ExecutionConfig.model_validate(config), address)


def test_a_node_holds_as_many_workers_as_all_its_resources_allow() -> None:
    assert GPU_NODE.room({"CPU": 1, "GPU": 1}) == 2
    assert GPU_NODE.room({"CPU": 3, "GPU": 1}) == 1
    assert GPU_NODE.room({"GPU": 0.1}) == 20
    assert GPU_NODE.room({"GPU": 0.6}) == 2, "no worker has parts of two GPUs"
    assert GPU_NODE.room({"accelerator_type:H100": 0.001, "GPU": 0.5}) == 4
    assert CPU_NODE.room({"GPU": 0.5}) == 0


def test_on_a_cluster_tasks_and_workers_ask_for_the_nodes_they_are_meant_for(tmp_path: Path) -> None:
    made = executor(tmp_path, resources={"cpu_node": 0.001})
    nodes = [CPU_NODE, GPU_NODE]
    assert made.demand(Fetch(ToyOptions()), nodes) == {"CPU": 1.0, "cpu_node": 0.001}
    assert made.demand(stage(num_gpus=None), nodes) == {"CPU": 1.0, "GPU": 1.0}
    wanted = stage(num_gpus=0.5, custom={"accelerator_type:H100": 0.001})
    assert made.demand(wanted, nodes) == {"CPU": 1.0, "GPU": 0.5, "accelerator_type:H100": 0.001}
    assert made.demand(stage(num_gpus=1.0), [CPU_NODE]) == {"CPU": 1.0, "GPU": 1.0}, "demand for an autoscaler"
    alone = executor(tmp_path, address=None, resources={"cpu_node": 0.001})
    assert alone.demand(Fetch(ToyOptions()), [CPU_NODE]) == {"CPU": 1.0}
    assert alone.demand(stage(num_gpus=1.0), [CPU_NODE]) == {}, "this machine has no GPU: on the CPU"


def test_workers_are_asked_for_while_tasks_wait_and_get_none_before_they_have_a_node(tmp_path: Path) -> None:
    made = pool(3, tmp_path)
    assert [request for _, _, request in give(made, 0, 1)] == [None, None]
    assert len(made.waiting) == 2
    (first, second) = made.workers
    made.placed(second, "node")
    assert [(w, r.shard.index) for _, w, r in made.feed() if r] == [(second, 0), (second, 1)]
    assert first.num_running == 0, "it may wait for ever"
    give(made, *range(2, 9))
    assert len(made.workers) == 3, "no more than the limit"


def test_on_a_ray_of_this_machine_a_stage_that_waits_has_a_worker_for_each_cpu_with_several_tasks(
    tmp_path: Path,
) -> None:
    fetch = Fetch(ToyOptions(fetch_waits=True))
    here, joined = executor(tmp_path, fetch, address=None), executor(tmp_path, fetch)
    assert (here._has_pool(fetch), joined._has_pool(fetch)) == (True, False)
    assert not here._has_pool(Fetch(ToyOptions())), "it computes, and Ray counts its CPU"
    made = WorkerPool(fetch, RunFolder(tmp_path), {}, mock.Mock(), None)
    made.resize([GPU_NODE])
    assert (made.limit, made.slots) == (4, 2)


def test_the_number_of_workers_follows_the_cluster_up_to_what_the_stage_allows(tmp_path: Path) -> None:
    made = WorkerPool(stage(num_gpus=1.0), RunFolder(tmp_path), {"CPU": 1, "GPU": 1}, mock.Mock(), None)
    made.resize([CPU_NODE])
    assert made.limit == 1, "a first one is asked for, so that a cluster without GPUs grows"
    made.resize([CPU_NODE, GPU_NODE, GPU_NODE])
    assert made.limit == 4
    made.stage.max_workers = 3
    made.resize([CPU_NODE])
    assert made.limit == 3


def test_a_task_beside_which_a_worker_died_runs_alone(tmp_path: Path) -> None:
    made = pool(1, tmp_path)
    give(made, 0)
    worker = made.workers[0]
    made.placed(worker, "node")
    made.feed()
    assert give(made, 1, alone=True) == []
    made.finish(worker)
    assert [r.shard.index for _, _, r in made.feed() if r] == [1]
    assert give(made, 2) == []
    made.finish(worker)
    assert [r.shard.index for _, _, r in made.feed() if r] == [2]


def test_an_idle_worker_is_released_and_made_again(tmp_path: Path) -> None:
    made = pool(1, tmp_path)
    give(made, 0)
    worker = made.workers[0]
    made.placed(worker, "node")
    made.feed()
    with mock.patch("ray.kill") as kill:
        made.release_idle(0.0)
        assert made.workers == [worker], "it has a task"
        made.finish(worker)
        made.release_idle(1000.0)
        assert made.workers == [worker]
        made.release_idle(0.0)
    kill.assert_called_once_with(worker.actor)
    assert made.workers == []
    give(made, 1)
    assert len(made.workers) == 1


def test_workers_that_never_start_end_the_run(tmp_path: Path) -> None:
    made = pool(1, tmp_path)
    made.start_failed(RuntimeError("no such package"))
    made.start_failed(RuntimeError("no such package"))
    with pytest.raises(MachineError, match="cube: its workers cannot be started on Ray: no such package"):
        made.start_failed(RuntimeError("no such package"))


def test_workers_whose_nodes_are_lost_while_they_start_do_not_end_the_run(tmp_path: Path) -> None:
    from ray.core.generated import common_pb2
    from ray.exceptions import ActorDiedError

    cube, messages = stage(), cast(Any, common_pb2)
    made = executor(tmp_path, cube)
    made.pools["cube"] = pool(1, tmp_path)

    def start_fails(why: str) -> None:
        reference, worker, _ = made.pools["cube"]._start_worker()
        made.running[reference] = (made.pools["cube"], worker, None)
        error = ActorDiedError(messages.ActorDiedErrorContext(actor_id=b"0" * 16, error_message=why))
        with mock.patch("ray.get", side_effect=error), mock.patch("ray.kill"):
            made._collect(reference)

    for _ in range(5):
        start_fails("The actor died because its node has died. Node Id: 0123")
    start_fails("The actor process has died.")
    start_fails("The actor process has died.")
    with pytest.raises(MachineError, match="cube: its workers cannot be started on Ray"):
        start_fails("The actor process has died.")


def test_the_user_is_told_which_resource_no_node_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fetch = Fetch(ToyOptions())
    made = executor(tmp_path, fetch, resources={"cpu_node": 0.001})
    made.demands["fetch"] = made.demand(fetch, [CPU_NODE])
    made.running[mock.Mock()] = (None, None, TaskRequest("fetch", Shard(0, [], 0), frozenset(), {}))
    with caplog.at_level(logging.WARNING):
        made._refresh([CPU_NODE, GPU_NODE])
        assert not caplog.messages
        made._refresh([GPU_NODE])
        made._refresh([GPU_NODE])
    assert caplog.messages == ["fetch waits for a node with CPU 1, cpu_node 0.001: of 1 nodes none has it"]


def test_the_window_grows_with_the_cluster(tmp_path: Path) -> None:
    made = executor(tmp_path)
    made._refresh([CPU_NODE])
    assert made.window == 16
    made._refresh([CPU_NODE, CPU_NODE, GPU_NODE])
    assert made.window == 40


def test_a_task_on_a_blind_node_is_a_lost_node_and_later_ones_go_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = executor(tmp_path, Fetch(ToyOptions()), stage())
    nodes, request = [CPU_NODE, GPU_NODE], TaskRequest("fetch", Shard(0, [], 0), frozenset(), {})
    with (
        mock.patch.object(ray_executor, "connect", return_value=nodes),
        mock.patch.object(ray_executor, "living_nodes", return_value=nodes),
        mock.patch.object(HeadWatch, "start"),
        mock.patch.object(SeeingNodes, "ask") as ask,
        mock.patch("ray.put"),
    ):
        made._start()
        assert made.seeing is not None
        ask.assert_called_once_with(nodes)
        placed = made.remote_task["fetch"]
        worker = RayWorker(mock.Mock(), node="cpu")
        made.pools["cube"].workers.append(worker)
        with mock.patch("ray.kill") as kill:
            seen = made._seen(TaskOutcome(request, error="unseen", lost="node", node="cpu", unseen="nothing there"))
        assert (seen.lost, made.nodes, made.pools["cube"].workers) == ("node", [GPU_NODE], [])
        kill.assert_called_once_with(worker.actor)
        assert made.remote_task["fetch"] is not placed, "with a selector that Ray has accepted"
        failed = made._seen(TaskOutcome(request, error="no such file", node="cpu", fatal_exit_code=4))
        assert (failed.lost, failed.fatal_exit_code) == ("node", None)
        missing = Record("squares", 0, "", "", 1, 1, files=(CommittedFile("store/squares/00000.txt", 3, ""),))
        reported = TaskOutcome(request, records={"squares": missing}, node="gpu")
        assert (made._confirmed([reported]), made.num_tasks) == ([], 1), "it may appear"
        made.run.storage.write(missing.file.path, b"abc")
        assert (made._confirmed([]), made.num_tasks) == ([reported], 0)
        made.run.storage.delete(missing.file.path)
        monkeypatch.setattr(ray_executor, "_APPEAR_S", -1.0)
        with pytest.raises(MachineError, match="is left for fetch, as these do not see this folder"):
            made._confirmed([reported])


def test_without_its_head_a_run_asks_ray_for_nothing_and_ends_to_be_run_again(tmp_path: Path) -> None:
    made = executor(tmp_path)
    made.started, made.head = True, HeadWatch("127.0.0.1:1", own=False)
    with mock.patch("ray.wait") as wait, mock.patch("ray.nodes") as nodes, mock.patch("ray.shutdown") as shutdown:
        made.head._silent_since = time.monotonic()
        assert made.wait(0.0) == []
        made.head._silent_since -= 100
        with pytest.raises(
            PreemptedError, match=r"\(127.0.0.1:1\) was not reached for 1.. s: .* run the same command"
        ):
            made.wait(0.0)
        with mock.patch.object(HeadWatch, "leave") as leave:
            made.close()
    leave.assert_called_once_with()
    assert [wait.called, nodes.called, shutdown.called] == [False] * 3


def test_a_head_is_lost_when_nobody_listens_and_back_when_somebody_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_head, "_EVERY_S", 0.01)
    monkeypatch.setattr(ray_head, "_end", mock.Mock())
    head = socket.create_server(("127.0.0.1", 0))
    address = "{}:{}".format(*head.getsockname())
    with HeadWatch(address, own=True) as watch:
        watch.patience_s = 1000.0
        watch._thread.start()
        watch.check()
        head.close()
        wait_until(lambda: watch.silent_s > 0)
        watch.check()
        watch.patience_s = 0.0
        with pytest.raises(PreemptedError, match=r"the head of the local Ray .* run the same command again"):
            watch.check()
        watch.patience_s = 1000.0
        with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
            wait_until(lambda: watch.silent_s == 0)
        assert not ray_head._end.called
        watch.patience_s = -1000.0  # longer ago than a run needs to end by itself
        wait_until(lambda: ray_head._end.called)


def test_a_head_that_is_back_as_another_cluster_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_head, "_EVERY_S", 0.01)
    monkeypatch.setattr(ray_head, "_AGAIN_S", 0.01)
    monkeypatch.setattr(ray_head, "_end", mock.Mock())
    found = mock.Mock(side_effect=[OSError("not ready"), "first", "second"])
    monkeypatch.setattr(ray_head, "cluster_id", found)
    head = socket.create_server(("127.0.0.1", 0))
    address = "{}:{}".format(*head.getsockname())
    with HeadWatch(address, own=False, cluster="first") as watch:
        watch._thread.start()
        head.close()
        wait_until(lambda: watch.silent_s > 0)
        with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))) as head:
            wait_until(lambda: watch.silent_s == 0)
            watch.check()
        wait_until(lambda: watch.silent_s > 0)
        watch.check()
        with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
            wait_until(lambda: watch.is_another)
            with pytest.raises(PreemptedError, match="was started again and knows nothing of this run"):
                watch.check()
            assert watch.silent_s > 0, "so that nothing is asked of it"
            assert not ray_head._end.called
            with watch.in_call():
                wait_until(lambda: ray_head._end.called)
    assert found.call_count == 3


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Losing(InlineExecutor):
    """Loses the first tasks."""

    def __init__(self, run: RunFolder, kind: Any, times: int):
        super().__init__(run)
        self.kind, self.left = kind, times

    def wait(self, timeout_s: float) -> list[TaskOutcome]:
        if self.left:
            self.left -= 1
            _, request = self.queue.popleft()
            assert request.attempt == 1
            return [TaskOutcome(request, error="lost", lost=self.kind)]
        return super().wait(timeout_s)


def run_losing(tmp_path: Path, kind: str, times: int) -> None:
    made = Losing(RunFolder(tmp_path), kind, times)
    config = ToyConfig.model_validate({"toy": {"num_shards": 1}, "execution": {"max_attempts": 2, "retry_delay_s": 0}})
    with mock.patch("pipeline.engine.runner.make_executor", return_value=made):
        Toy(config).run(tmp_path, RunOptions(quiet=True))


@pytest.mark.parametrize(("kind", "times"), [("node", 19), ("worker", 1)])
def test_lost_nodes_and_workers_do_not_use_up_the_attempts_of_a_shard(tmp_path: Path, kind: str, times: int) -> None:
    run_losing(tmp_path, kind, times)
    assert (tmp_path / "store" / "squares" / "00000.txt").exists()


@pytest.mark.parametrize(("kind", "times"), [("node", 20), ("worker", 2)])
def test_a_shard_that_brings_down_worker_after_worker_is_set_aside(tmp_path: Path, kind: str, times: int) -> None:
    with pytest.raises(ShardError, match="1 of 1 shards failed"):
        run_losing(tmp_path, kind, times)


@pytest.mark.slow
@pytest.mark.ray
def test_a_local_ray_listens_on_the_loopback_interface_only_and_starts_nothing_needless() -> None:
    """The audit hook of the tests is in Ray's processes of Python, and fails the test if one asked."""
    import ray

    connect(1, None)
    try:
        assert ray.get(ray.remote(node_id).remote())
        pids = {os.getpid(), *descendants(os.getpid())}
        assert len(pids) > 5, "they are Ray's"
        assert open_ports(pids) == set()
        lines = " ".join(descendants(os.getpid()).values())
        assert "raylet" in lines
        assert not any(name in lines for name in ("dashboard.py", "monitor.py")), "they would ask, or have no use"
    finally:
        leave()
