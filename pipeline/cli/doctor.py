"""Checks whether the machine has what a run needs; each finding says what to do."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline.engine.room import Room, existing
from pipeline.errors import ConfigError
from pipeline.storage.disk import file_system_type
from pipeline.storage.run_folder import ESTIMATE, RunFolder

Check = dict[str, str]

_DISTRIBUTION = "imagen-precompute"
_MIN_FREE_BYTES = 10 * 2**30
_IN_MEMORY = ("tmpfs", "ramfs")


def examine() -> list[Check]:
    """All checks: name, status (ok, note or bad) and a message with the remedy."""
    return [
        _python(),
        *_packages(),
        _torchvision(),
        _gpus(),
        _memory(),
        _disk("disk", Path.cwd(), "a run folder may need more: pipeline plan says how much"),
        _disk("temporary files", Path(tempfile.gettempdir()), "set TMPDIR to a folder with more room"),
        _ray_port(),
        _hub(),
    ]


def _check(name: str, status: str, message: str) -> Check:
    return {"name": name, "status": status, "message": message}


def _python() -> Check:
    version = platform.python_version()
    needed = SpecifierSet(importlib.metadata.metadata(_DISTRIBUTION)["Requires-Python"] or "")
    if not needed.contains(version):
        return _check("python", "bad", f"{version}; {needed} is needed")
    return _check("python", "ok", version)


def _packages() -> list[Check]:
    """Compares the requirements of the distribution with the installed packages."""
    checks = []
    for text in importlib.metadata.requires(_DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(_check(requirement.name, "bad", f"missing; pip install '{text}'"))
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        message = version if fits else f"{version}, but {requirement.specifier} is needed; pip install '{text}'"
        checks.append(_check(requirement.name, "ok" if fits else "bad", message))
    return checks


def _torchvision() -> Check:
    """A torchvision built for CUDA next to a CPU torch breaks transformers (pytorch/vision#9077)."""
    if importlib.util.find_spec("torchvision") is None:
        return _check("torchvision", "ok", "absent, as it should be")
    try:
        import torchvision  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError, OSError) as error:
        return _check(
            "torchvision", "bad", f"installed but broken ({error}); it breaks transformers: pip uninstall torchvision"
        )
    return _check("torchvision", "note", f"{torchvision.__version__} is installed; it is not needed")


def _gpus() -> Check:
    import torch

    if not torch.cuda.is_available():
        return _check("gpu", "note", "none; encoders run on the CPU (a large T5 needs a GPU)")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return _check("gpu", "ok", f"{len(names)}: {', '.join(sorted(set(names)))}")


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _check("memory", "ok" if total > 4 * 2**30 else "note", f"{total / 2**30:.1f} GiB, {os.cpu_count()} CPUs")


def _disk(name: str, folder: Path, remedy: str) -> Check:
    free, kind = shutil.disk_usage(folder).free, file_system_type(folder)
    message = f"{free / 2**30:.1f} GiB free in {folder}"
    if kind in _IN_MEMORY:
        return _check(name, "note", f"{message}, which is memory ({kind}); {remedy}")
    return _check(name, "ok", message) if free > _MIN_FREE_BYTES else _check(name, "note", f"{message}; {remedy}")


def examine_planned(out: str) -> list[Check]:
    """Free disk against the bytes of the plan that `pipeline plan --save` left in a run folder.

    Raises:
        ConfigError: there is none.
    """
    run = RunFolder(out)
    saved = run.read_engine_file(ESTIMATE)
    if saved is None or "disk" not in saved:
        raise ConfigError(f"{run.url}/{ESTIMATE}: no plan with bytes; make one with `pipeline plan ... --save`")
    checks = []
    for values in saved["disk"]:
        place = existing(Path(values["folder"]))
        room = replace(Room(**values), free_bytes=shutil.disk_usage(place).free)
        status = "bad" if room.is_hopeless else "note" if room.is_too_small else "ok"
        remedy = "" if status == "ok" else "; make room, or choose another --out or TMPDIR"
        checks.append(_check("planned bytes", status, f"{room}{remedy}"))
    return checks


def _ray_port() -> Check:
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode == "token":
        return _check("ray", "ok", "token authentication on; a local run starts no dashboard")
    return _check("ray", "note", f"RAY_AUTH_MODE={mode}: anyone who reaches Ray's ports can run code; unset it")


def _hub() -> Check:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    where = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    text = "HF_HUB_OFFLINE is set; models come from local folders and the cache" if offline else "online"
    return _check("model hub", "ok", f"{text}; cache {where}")
