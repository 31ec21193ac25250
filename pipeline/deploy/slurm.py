"""What a Slurm job asks for, and what the containers of Pyxis that it runs in see of the file system."""

import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.resources import Resources

_GPUS_PER_NODE = 8
_QUEUE = ("partition", "account", "qos")
_TIME = "24:00:00"
_STOP_S = 300  # a training saves a checkpoint in it
_WORD = re.compile(r"[\w.,:@+/-]+")
_GPUS = re.compile(r"(?:[\w.-]+:)?(\d+)", re.ASCII)
_MEMORY = re.compile(r"\d+[KMGT]?", re.ASCII)
_TIME_FORMS = (
    (re.compile(r"(\d+)", re.ASCII), (60,)),
    (re.compile(r"(\d+):(\d+)", re.ASCII), (60, 1)),
    (re.compile(r"(\d+):(\d+):(\d+)", re.ASCII), (3600, 60, 1)),
    (re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII), (86400, 3600, 60, 1)),
)
"""The forms of sbatch(1), and the seconds of each number."""


@dataclass(frozen=True, slots=True)
class SlurmOptions:
    """What a job asks for. None: what the run needs, or what the cluster gives a job that does not say."""

    nodes: int | None = None
    cpus: int | None = None
    """CPUs per node."""
    gpus: str | None = None
    """GPUs per node, as `4` or `a100:4`; `0` asks for none."""
    memory: str | None = None
    """Memory per node, as `64G`; without a letter in MiB."""
    time: str | None = None
    """Longest time of the job, in a form of sbatch; default a day."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    array: int | None = None
    """Tasks of a job array, each of which makes one part of the run."""


def slurm_values(
    options: SlurmOptions, needs: Resources, image: str | None, *, writable: Sequence[str], paths: Iterable[str]
) -> dict[str, object]:
    """The variables of the templates that only Slurm has.

    Args:
        image: the container that Pyxis runs the job in; None: the Python environment of this machine.
        writable: absolute paths of the folders that the run writes into.
        paths: absolute paths of what it reads.
    Raises:
        ConfigError: a value that Slurm or Pyxis would not take.
    """
    _check(options)
    wanted = math.ceil(1 if needs.num_gpus is None else needs.num_gpus)
    wanted = min(wanted, 1) if options.array else wanted
    gpus = str(min(wanted, _GPUS_PER_NODE)) if options.gpus is None else options.gpus
    per_node = int(gpus.rpartition(":")[2])
    nodes = options.nodes or (max(1, math.ceil(wanted / per_node)) if per_node else 1)
    time = options.time or _TIME
    queue = [f"--time={time}"]
    queue += [f"--{name}={value}" for name in _QUEUE if (value := getattr(options, name)) is not None]
    job = [f"--nodes={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={options.cpus or math.ceil(needs.num_cpus)}"]
    job += [f"--gpus-per-node={gpus}"] if per_node else []
    job += [f"--mem={options.memory}"] if options.memory is not None else []
    job += [*queue, "--requeue", f"--signal=B:USR1@{min(_STOP_S, seconds_of(time) // 2)}"]
    job += [f"--array=1-{options.array}"] if options.array else []
    return {
        "directives": job,
        "finish_directives": ["--nodes=1", "--ntasks=1", *queue, "--requeue"],
        "parts": options.array,
        "executor": "ray" if per_node > 1 else None,
        "mounts": None if image is None else container_mounts(paths, writable),
        "made": writable,
    }


def array_install(paths: Sequence[str]) -> str:
    """The shell command that submits an array's script, and after it that of the job that finishes the run."""
    tasks, finish = map(shlex.quote, paths)
    return f"sbatch --dependency=afterany:$(sbatch --parsable {tasks} | cut -d';' -f1) {finish}"


def seconds_of(time: str) -> int:
    """Seconds of a time limit as sbatch takes it: `90`, `90:00`, `1:30:00`, `1-12`, `1-12:30`, `1-12:30:00`.

    Raises:
        ConfigError: another form, or no time at all.
    """
    for form, units in _TIME_FORMS:
        if found := form.fullmatch(time):
            seconds = sum(int(number or 0) * unit for number, unit in zip(found.groups(), units, strict=True))
            if seconds:
                return seconds
    raise ConfigError(f"--time {time}: is no time limit of Slurm; for example 90 (minutes), 12:00:00 or 2-00:00:00")


def _check(options: SlurmOptions) -> None:
    for name in ("nodes", "cpus", "array"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise ConfigError(f"--{name} {number}: must be at least 1")
    if options.array and (options.nodes or 1) > 1:
        raise ConfigError(f"--nodes {options.nodes}: a task of an array runs on one node; leave it or --array out")
    if options.gpus is not None and not _GPUS.fullmatch(options.gpus):
        raise ConfigError(f"--gpus {options.gpus}: is no number of GPUs; for example 4, or a100:4")
    if options.memory is not None and not _MEMORY.fullmatch(options.memory):
        raise ConfigError(f"--memory {options.memory}: is no amount of memory; for example 64G")
    if options.time is not None:
        seconds_of(options.time)
    for name in _QUEUE:
        word = getattr(options, name)
        if word is not None and not _WORD.fullmatch(word):
            raise ConfigError(f"--{name} {word!r}: is no name of Slurm; use letters, digits and ._-")


def container_mounts(paths: Iterable[str], writable: Sequence[str]) -> str:
    """What a container sees, for `srun --container-mounts`: each folder or file once, under its own path.

    Args:
        paths: absolute; seen read-only.
        writable: absolute; seen with the right to write.
    Raises:
        ConfigError: a path that Pyxis cannot be given.
    """
    written = _outermost(writable)
    read = [path for path in _outermost(paths) if not any(_is_inside(path, folder) for folder in written)]
    for path in (*written, *read):
        if found := re.search(r"[\s,:]", path):
            raise ConfigError(
                f"--container-image: {path} cannot be mounted, for Pyxis takes no {found[0]!r} in a path; use another"
            )
    return ",".join([*(f"{path}:{path}" for path in written), *(f"{path}:{path}:ro" for path in read)])


def local_paths(settings: object) -> list[str]:
    """The absolute paths in a configuration that exist here; of a pattern, the folder that all its files are in."""
    found = (_folder_of(text) for text in _texts(settings) if text.startswith("/"))
    return sorted({path for path in found if path != "/" and Path(path).exists()})


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, Sequence):
        for each in value:
            yield from _texts(each)


def _folder_of(path: str) -> str:
    fixed = re.split(r"[*?\[{]", path, maxsplit=1)[0]
    return (path if fixed == path else fixed.rpartition("/")[0]).rstrip("/") or "/"


def _outermost(paths: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for path in sorted(set(paths), key=lambda path: (path.count("/"), path)):
        if not any(_is_inside(path, folder) for folder in kept):
            kept.append(path)
    return kept


def _is_inside(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)
