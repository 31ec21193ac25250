"""Executors by name."""

from collections.abc import Sequence

from pipeline.errors import ConfigError
from pipeline.executors.base import ExecutionConfig, Executor
from pipeline.stage import Stage
from pipeline.storage.run_folder import RunFolder

EXECUTORS = ("ray", "local", "inline")


def make_executor(
    kind: str, stages: Sequence[Stage], run: RunFolder, config: ExecutionConfig, address: str | None
) -> Executor:
    """Builds the executor of this name.

    Raises:
        ConfigError: there is no such executor.
    """
    if kind not in EXECUTORS:
        raise ConfigError(f"--executor: must be one of {', '.join(EXECUTORS)} (got {kind!r})")
    if address is not None and kind != "ray":
        raise ConfigError(f"--address: only the ray executor joins a cluster (got --executor {kind})")
    if kind == "inline":
        from pipeline.executors.inline import InlineExecutor

        return InlineExecutor(run)
    if kind == "ray":
        from pipeline.executors.ray import RayExecutor

        return RayExecutor(stages, run, config, address)
    from pipeline.executors.local import LocalExecutor

    return LocalExecutor(stages, run, config)
