"""Checks whether the machine has what a run needs; each finding says what to do."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

Check = dict[str, str]

_DISTRIBUTION = "imagen-precompute"
_MIN_FREE_BYTES = 10 * 2**30


def examine() -> list[Check]:
    """All checks: name, status (ok, note or bad) and a message with the remedy."""
    return [
        _python(),
        *_packages(),
        _torchvision(),
        _gpus(),
        _memory(),
        _disk(),
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


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    status = "ok" if free > _MIN_FREE_BYTES else "note"
    return _check("disk", status, f"{free / 2**30:.1f} GiB free in {Path.cwd()}")


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
