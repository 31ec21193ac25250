"""The processes below a process, from /proc."""

import time
from pathlib import Path


def descendants(pid: int) -> dict[int, str]:
    """Process id -> command line of all processes below `pid`."""
    table: dict[int, tuple[int, str]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError, IndexError):
                continue
            table[int(folder.name)] = (parent, line)
    found: dict[int, str] = {}
    frontier = [pid]
    while frontier:
        parents, frontier = frontier, []
        for child, (parent, line) in table.items():
            if parent in parents and child not in found:
                found[child] = line
                frontier.append(child)
    return found


def wait_until_gone(pids: list[int], timeout_s: float) -> list[int]:
    """Waits until all the processes have ended; returns the ones still alive at the timeout."""
    deadline = time.monotonic() + timeout_s
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [pid for pid in pids if is_alive(pid)]


def is_alive(pid: int) -> bool:
    """True while the process runs; a zombie does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_worker(line: str) -> bool:
    """Whether a command line is that of a worker of the local executor, or of what workers are forked from."""
    return "spawn_main" in line or "multiprocessing.forkserver" in line
