"""A real Slurm on loopback: munge, a controller and nodes of this machine, in a folder of their own."""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "srun")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_START_S = 60.0
_REQUEUE_AFTER_S = 5  # by default Slurm starts a job that was put back after 120 s

CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={again_s}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=20
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 RealMemory=2000
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def slurm_missing() -> str:
    """Why there can be no Slurm here; empty if there can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    return f"needs {', '.join(missing)} (Debian: slurmctld, slurmd, slurm-client, munge)" if missing else ""


_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass
class Slurm:
    """Two nodes, n1 and n2, with two CPUs each."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]]

    def call(self, *words: str, cwd: Path | None = None, check: bool = True) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=280, check=False
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def version(self) -> str:
        return self.call("sbatch", "--version").removeprefix("slurm-wlm ")

    def facts(self, job: str) -> dict[str, str]:
        """What the controller knows of a job: `JobState`, `NodeList`, `Restarts`, `ExitCode`, ..."""
        return self.all_facts(job)[0]

    def all_facts(self, job: str) -> list[dict[str, str]]:
        """The same of each task of an array."""
        lines = self.call("scontrol", "show", "job", "--oneliner", job).splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def states(self) -> dict[str, str]:
        """The state of each job and task of an array that has not ended."""
        lines = self.call("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return {job: state for job, state in map(str.split, lines) if state != "COMPLETED"}

    def wait(self, what: str, until: Callable[[], bool], timeout_s: float) -> None:
        """Waits until something is so; fails with the logs' ends where it takes too long."""
        give_up = time.monotonic() + timeout_s
        while not until():
            if time.monotonic() > give_up:
                logs = "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))
                raise AssertionError(f"not within {timeout_s:.0f} s: {what}\n{self.states()}\n{logs}")
            time.sleep(0.3)

    def submit(self, words: Sequence[str], folder: Path) -> list[str]:
        """Writes the files of `pipeline schedule WORDS` into a folder and submits them as it says; the jobs' ids, in
        the order in which they run."""
        command = [sys.executable, "-m", "pipeline", "schedule", *words, "--kind", "slurm", "--write-to", str(folder)]
        *_, last = self.call(*command).splitlines()
        told = self.call("bash", "-c", last.removeprefix("install: "), cwd=folder)
        (job,) = re.findall(r"Submitted batch job (\d+)", told)
        return [*re.findall(r"afterany:(\d+)", self.facts(job)["Dependency"]), job]

    def wait_for_end(self, job: str, timeout_s: float) -> dict[str, str]:
        """Waits until a job has ended for good; returns its facts."""
        self.wait(f"the end of job {job}", lambda: self.facts(job)["JobState"] in _ENDED, timeout_s)
        return self.facts(job)

    def end_node(self, node: str) -> None:
        """Ends a node as a loss of power does: its daemon, and all that it started, at once."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        found = self._processes()
        jobs = {pid for pid, values in found.items() if values.get("SLURMD_NODENAME") == node}
        _kill({parent for pid in jobs if (parent := _parent(pid)) in found} - jobs)  # before they report a job's end
        _kill(jobs)

    def start_node(self, node: str) -> None:
        self.daemons[node] = _start(self.environment, self.folder, "slurmd", "-D", "-N", node)

    def wait_for_nodes(self) -> None:
        """Waits until both nodes take jobs."""
        shown = ("sinfo", "--noheader", "--format=%D %T")
        self.wait("nodes", lambda: "2 idle" in self.call(*shown, check=False), _START_S)

    def close(self) -> None:
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()
        for _ in range(10):  # a job that was starting may have started more
            if not _kill(set(self._processes())):
                break
            time.sleep(0.2)

    def _processes(self) -> dict[int, Mapping[str, str]]:
        """The environment of each process that belongs to this cluster, by its id."""
        found: dict[int, Mapping[str, str]] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with suppress(OSError):
                words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                values = dict(word.split("=", 1) for word in words if "=" in word)
                if values.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found[int(entry.name)] = values
        return found


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _kill(pids: set[int]) -> bool:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(pids)


@contextmanager
def slurm() -> Iterator[Slurm]:
    """A cluster that takes jobs; all its processes end with the context."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not in pytest's folder, whose path is too long for a socket
    path = f"{folder}/bin:{Path(sys.executable).parent}:{_PATH}"
    further = {"PATH": path, "SLURM_CONF": f"{folder}/slurm.conf", "RAY_TMPDIR": str(folder)}
    cluster = Slurm(folder, {**os.environ, **further}, {})
    try:
        _configure(folder)
        _write_stand_ins(folder / "bin")
        munge = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in _MUNGE]
        cluster.daemons["munge"] = _start(cluster.environment, folder, "munged", "-F", "--force", *munge)
        cluster.wait("munge", (folder / "munge.socket").exists, _START_S)
        cluster.daemons["slurmctld"] = _start(cluster.environment, folder, "slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            cluster.start_node(node)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


_MUNGE = ("socket", "key-file", "pid-file", "log-file", "seed-file")


def _configure(folder: Path) -> None:
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    ports = _free_ports()
    text = CONFIGURATION.format(folder=folder, user=getpass.getuser(), ports=ports, again_s=_REQUEUE_AFTER_S)
    (folder / "slurm.conf").write_text(text)


def _write_stand_ins(folder: Path) -> None:
    """Commands that jobs find first.

    A `hostname` that tells a loopback address (Ray would take 127.0.0.1 for another one), and an `srun` without Pyxis:
    it notes the options of containers, and runs the command without.
    """
    folder.mkdir()
    real = {name: shutil.which(name, path=_PATH) for name in ("hostname", "srun")}
    texts = {
        "hostname": f'[ "$1" = -I ] && echo 127.0.0.2 || exec {real["hostname"]} "$@"',
        "srun": f'''words=()
for word in "$@"; do
  case $word in --container-*) echo "$word" >>{folder}/containers ;; *) words+=("$word") ;; esac
done
exec {real["srun"]} "${{words[@]}}"''',
    }
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)


def _free_ports() -> tuple[int, int, int]:
    """One for the controller, and two in a row for the nodes."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second, socket.socket() as third:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            port = second.getsockname()[1]
            with suppress(OSError, OverflowError):
                third.bind(("127.0.0.1", port + 1))
                return first.getsockname()[1], port, port + 1
    raise AssertionError("no free ports")


def _start(environment: Mapping[str, str], folder: Path, *words: str) -> subprocess.Popen[bytes]:
    program = shutil.which(words[0], path=_PATH)
    assert program is not None
    with (folder / f"{words[-1] if '-N' in words else words[0]}.out.log").open("ab") as output:
        return subprocess.Popen(
            [program, *words[1:]], env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
