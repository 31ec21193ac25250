"""The machine that a plan is for: this one, or one described by a profile."""

from importlib.resources import files
from pathlib import Path

from pydantic import Field

from pipeline.config import Config, load_config, local_path
from pipeline.errors import ConfigError
from pipeline.executors.base import ExecutionConfig, usable_cpus


class Spot(Config):
    """The same machines as those that their owner takes back at any time."""

    usd_per_gpu_hour: float | None = Field(default=None, ge=0)
    """As of `Hardware`."""
    usd_per_cpu_hour: float | None = Field(default=None, ge=0)
    """As of `Hardware`."""
    interruptions_per_node_hour: float = Field(ge=0)
    """How often a node is taken away, per hour in which it is paid for."""
    wait_s: float = Field(default=0.0, ge=0)
    """Unpaid seconds from an interruption until another node is there."""
    start_s: float = Field(default=0.0, ge=0)
    """Paid seconds of a node until its first task, `model_start_s` not included: boot, container image, Ray."""


class Hardware(Config):
    """A machine, or equal ones as a cluster, and its prices."""

    num_gpus: int = Field(ge=0)
    """GPUs of the machine."""
    num_cpus: int = Field(ge=1)
    """CPUs, as the operating system counts them."""
    num_nodes: int = Field(default=1, ge=1)
    """Equal nodes that these GPUs and CPUs are spread over."""
    tflops: dict[str, float] = Field(default_factory=dict)
    """Dense matrix multiplication by type (`bfloat16`, `float32`), in 10^12 FLOP per second: of one GPU; without GPUs,
    of all CPUs together."""
    utilisation: float = Field(default=1.0, gt=0, le=1)
    """Fraction of this rate that an encoder reaches."""
    cpu_s_per_row: dict[str, float] = Field(default_factory=dict)
    """CPU seconds per row of each stage that runs no model; `--probe` measures them instead. `read-captions` is that
    of the stages of all further sets of captions, `read-captions-NAME`."""
    task_s: float = Field(default=0.0, ge=0)
    """Seconds of a task however many rows its shard has, as scheduling, opening files and the commit take; only for
    the choice of a shard size. `--probe` measures them instead."""
    original_bytes: int = Field(default=0, ge=0)
    """Bytes of an original image; `--probe` measures them instead."""
    network_gbit_per_s: float | None = Field(default=None, gt=0)
    """Download rate of all fetching together; null means that it is never the limit."""
    model_start_s: float = Field(default=0.0, ge=0)
    """Seconds before a worker's first batch: loading packages, and the model's weights from disk."""
    step_s: float | None = Field(default=None, gt=0)
    """Of a training: seconds per step, as in `metrics.jsonl`; null means unknown."""
    checkpoint_s: float | None = Field(default=None, gt=0)
    """Of a training: seconds for which a checkpoint stops it; null means unknown."""
    usd_per_gpu_hour: float | None = Field(default=None, ge=0)
    """Price of a GPU with its share of the machine; null means unknown."""
    usd_per_cpu_hour: float | None = Field(default=None, ge=0)
    """Price of a CPU of a machine without GPUs; null means unknown."""
    usd_per_tb_month: float = Field(default=23.0, ge=0)
    """Price of 10^12 bytes in an object store for a month. Default: list price of Amazon S3 Standard, first 50 TB."""
    usd_per_million_puts: float = Field(default=5.0, ge=0)
    """Price of writing a million files to an object store. Default: list price of Amazon S3 Standard."""

    spot: Spot | None = None
    """Prices and interruptions of the same machines as spot machines; null means that there are none."""

    @property
    def usd_per_hour(self) -> float | None:
        """Price of the machine; None if unknown."""
        return self._usd(self)

    @property
    def spot_usd_per_hour(self) -> float | None:
        """Price of the machine as a spot machine; None if unknown."""
        return None if self.spot is None else self._usd(self.spot)

    def _usd(self, prices: "Hardware | Spot") -> float | None:
        count, price = (
            (self.num_gpus, prices.usd_per_gpu_hour) if self.num_gpus else (self.num_cpus, prices.usd_per_cpu_hour)
        )
        return None if price is None else count * price

    def seconds_per_row(self, stage: str) -> float | None:
        """CPU seconds per row of a stage by its name, or by what its name begins with; None if unknown."""
        parts = stage.split("-")
        names = ("-".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((self.cpu_s_per_row[name] for name in names if name in self.cpu_s_per_row), None)


def load_profile(name: str) -> Hardware:
    """A shipped profile, or a YAML file.

    Raises:
        ConfigError: it does not exist, or it is not valid.
    """
    return load_config(Hardware, find_profile(name))


def this_machine(config: ExecutionConfig) -> Hardware:
    """The resources that a run may use here; without prices, except for the object store."""
    from pipeline.executors.local import visible_gpus

    return Hardware(num_gpus=len(visible_gpus()), num_cpus=config.num_cpus or usable_cpus())


def profiles() -> dict[str, Path]:
    """The shipped hardware profiles, by name."""
    root = Path(str(files("workflows"))) / "profiles"
    return {path.stem: path for path in sorted(root.glob("*.yaml"))}


def find_profile(name: str) -> Path:
    """The hardware profile's file of this path, or the shipped one of this name.

    Raises:
        ConfigError: neither exists.
    """
    path = local_path(name, "--profile")
    if path.suffix:
        return path
    if name not in profiles():
        raise ConfigError(f"--profile {name}: no such file or shipped profile; shipped: {', '.join(profiles())}")
    return profiles()[name]
