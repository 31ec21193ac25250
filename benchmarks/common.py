"""Shared by the benchmark scripts: timing, and one JSON report that says where the numbers come from."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Clock = Callable[[], float]


def median_rate(fn: Callable[[], object], seconds: float, clock: Clock = time.perf_counter) -> float:
    """Calls per second, from the median call of a run of at least `seconds` and 3 calls.

    `clock` is `time.process_time` for work on one core: time spent in other processes does not count.
    """
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = clock()
        fn()
        times.append(clock() - start)
    return 1.0 / statistics.median(times)


def interleaved_rates(
    fns: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Calls per second of each function, one value per round.

    Every round runs each function in turn, so a slow spell of the machine falls on all of them and the
    ratios inside a round stay fair.
    """
    for fn in fns.values():
        fn()  # warm up
    rates: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            rates[name].append(median_rate(fn, seconds, clock))
    return rates


def median_ratio(rates: Mapping[str, list[float]], numerator: str, denominator: str) -> float:
    """Median over the rounds of rate / rate of the same round."""
    pairs = zip(rates[numerator], rates[denominator], strict=True)
    return statistics.median(a / b for a, b in pairs)


def matmul_flops() -> float:
    """FLOP/s of a large bfloat16 matrix product."""
    import torch

    on_gpu = torch.cuda.is_available()
    side = 8192 if on_gpu else 1024
    a = torch.randn(side, side, device="cuda" if on_gpu else "cpu", dtype=torch.bfloat16)
    times: list[float] = []
    for _ in range(30):
        began = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(times[10:])


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ram_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": _cpu_model(), "cores": cores, "ram_gib": round(ram_bytes / 2**30, 1)}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions, with Python's own; an absent package is reported as absent."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str:
    """Commit of this checkout, with `-dirty` where tracked files differ from it."""
    root = Path(__file__).parent
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def report(
    name: str,
    results: list[dict[str, Any]],
    ratios: dict[str, float],
    out: Path | None,
    packages: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> None:
    """Print results and ratios as a table; write them as JSON to `out` unless it is None."""
    document = {
        "name": name,
        "hardware": hardware(),
        "versions": versions(packages),
        "commit": git_commit(),
        "notes": list(notes),
        "results": results,
        "ratios": ratios,
    }
    columns = list(dict.fromkeys(key for row in results for key in row))
    print_table(columns, [[row.get(column, "") for column in columns] for row in results])
    print_table(["ratio", "times"], [[key, value] for key, value in ratios.items()])
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=2) + "\n")


def print_table(columns: list[str], rows: list[list[Any]]) -> None:
    cells = [columns, *([f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
