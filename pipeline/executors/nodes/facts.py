"""What a node is and has: versions, GPUs, memory, disks, limits, files.

Ray ships this module by value: it also answers on a node with another version of this project, or without it, so it
imports nothing but the standard library.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
"""JSON: what `node_facts` returns."""

_GPU_FIELDS = "name,memory.total,memory.free,driver_version"
_GPU_TIMEOUT_S = 30
_TORCH_TIMEOUT_S = 180
_SHARED_MEMORY = "/dev/shm"
_MOST_FILES = 2000
_TRY_GPUS = """
import torch
for gpu in range(max(1, torch.cuda.device_count())):
    torch.ones(8, device=f"cuda:{gpu}").sum().item()
"""


def versions(packages: Iterable[str], code: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of packages by name, "" of those that are not there.

    Args:
        packages: names of distributions.
        code: names of packages whose source files are compared: `code` is a digest of them.
    """
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return {**found, "code": _code_digest(code)}


def node_facts(packages: Sequence[str], code: Sequence[str], run_folder: str, places: Sequence[str]) -> Facts:
    """All that is known of this machine.

    Args:
        packages, code: see `versions`.
        run_folder: a local path, or "".
        places: paths of files and folders that a run reads.
    """
    gpus, gpu_problem = _gpus()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    temporary = tempfile.gettempdir()
    return {
        "versions": versions(packages, code),
        "num_cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "gpu_problem": gpu_problem or (_unusable_gpus() if gpus else ""),
        "shared_memory": _room(_SHARED_MEMORY),
        "temporary": {**_room(temporary), "problem": _not_writable(temporary)},
        "run_folder": _room(run_folder) if run_folder else {},
        "open_files": {"soft": soft, "hard": hard},
        "places": {place: listing(place) for place in places},
    }


def listing(place: str) -> dict[str, Any]:
    """What is at a path: number of files, bytes, and a SHA-256 of names and sizes; `problem` if it cannot be listed.

    Of a folder with more than 2,000 files only the names at its top count.
    """
    path = Path(place)
    try:
        if not path.is_dir():
            files = [("", os.stat(path).st_size)]
        else:
            files = sorted(_files(path))
            if len(files) > _MOST_FILES:
                files = sorted((entry.name, 0) for entry in os.scandir(path))
    except FileNotFoundError:
        return {"problem": "there is no such file or folder"}
    except OSError as error:
        return {"problem": f"{type(error).__name__}: {error.strerror}"}
    digest = hashlib.sha256(repr(files).encode(errors="surrogateescape")).hexdigest()
    return {"files": len(files), "bytes": sum(size for _, size in files), "sha256": digest, "problem": ""}


class NodeProbe:
    """An actor that answers for its node."""

    def facts(self, packages: Sequence[str], code: Sequence[str], run_folder: str, places: Sequence[str]) -> Facts:
        return node_facts(packages, code, run_folder, places)

    def answer(self, token: Any, node: str) -> str:
        """Looks for the token of a run folder, and writes an answer: see `Token.answer`."""
        return str(token.answer(node))

    def clock(self) -> float:
        """Unix time, in seconds."""
        return time.time()


def answer_with_versions(
    token: Any, node: str, packages: Sequence[str], code: Sequence[str]
) -> tuple[str, dict[str, str]]:
    """What `Token.answer` finds on this node, and its versions."""
    return str(token.answer(node)), versions(packages, code)


def _files(folder: Path) -> Iterable[tuple[str, int]]:
    count = 0
    for above, folders, names in os.walk(folder):
        folders.sort()
        for name in names:
            path = os.path.join(above, name)
            yield os.path.relpath(path, folder), os.stat(path).st_size
            count += 1
            if count > _MOST_FILES:
                return


def _code_digest(packages: Sequence[str]) -> str:
    """SHA-256 of the Python files of packages, 12 digits; "" if one of them is not there, or is being written: Ray may
    unpack the code of a job once more while it runs."""
    total = hashlib.sha256()
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return ""
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            total.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
            try:
                total.update(hashlib.sha256(path.read_bytes()).digest())
            except OSError:
                return ""
    return total.hexdigest()[:12]


def _gpus() -> tuple[list[dict[str, Any]], str]:
    """The GPUs that the driver shows, and what is wrong with it."""
    command = ["nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_TIMEOUT_S, check=False)
    except OSError:
        return [], ""
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not end within {_GPU_TIMEOUT_S} s"
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return [], f"nvidia-smi: {said[0] if said else f'exit code {done.returncode}'}"
    gpus = []
    for line in done.stdout.splitlines():
        name, total, free, driver = (word.strip() for word in line.rsplit(",", 3))
        gpus.append(
            {"name": name, "memory_bytes": _mebibytes(total), "free_bytes": _mebibytes(free), "driver": driver}
        )
    return gpus, ""


def _mebibytes(text: str) -> int | None:
    return int(text) * 2**20 if text.isdigit() else None


def _unusable_gpus() -> str:
    """Why torch cannot compute on a GPU here; empty if it can, or is not there. Ray hides the GPUs from this process
    only, so another one tries."""
    if importlib.util.find_spec("torch") is None:
        return ""
    visible = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES" or value}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRY_GPUS],
            env=visible,
            capture_output=True,
            text=True,
            timeout=_TORCH_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"torch did not try them: {type(error).__name__}"
    said = done.stderr.strip().splitlines()
    return f"torch cannot use them: {said[-1] if said else done.returncode}" if done.returncode else ""


def _room(folder: str) -> dict[str, Any]:
    """Total and free bytes of the file system of a folder, or of the one above that is there."""
    path = Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return {"folder": folder, "total_bytes": 0, "free_bytes": 0}
    return {"folder": folder, "total_bytes": usage.total, "free_bytes": usage.free}


def _not_writable(folder: str) -> str:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"
    return ""
