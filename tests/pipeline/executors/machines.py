"""Two machines on this one: namespaces, each with a network, processes and a folder of Ray's, joined by a bridge.

What runs in them sees neither this machine's processes nor its network, so that `ray stop`, which ends every Ray that
it finds, ends theirs only. All of it ends with the first process.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.runs import REPOSITORY

NETWORK = "10.77.0"
_ISOLATED = ["--net", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
_FIRST = ["unshare", "--user", "--map-root-user", *_ISOLATED]
_BRIDGE = f"""
set -eu
ip link set lo up
ip link add bridge type bridge
ip link set bridge up
for node in 1 2; do
    unshare {" ".join(_ISOLATED)} sh "$FOLDER/node.sh" $node "$@" >"$FOLDER/$node.log" 2>&1 &
    eval "first$node=$!"
done
for node in 1 2; do
    eval "first=\\$first$node"
    until child=$(tr -d ' ' <"/proc/$first/task/$first/children") && [ "$child" ]; do sleep 0.1; done
    ip link add "port$node" type veth peer name eth0 netns "$child"
    ip link set "port$node" master bridge up
done
code=0
wait "$first1" || code=$?
wait "$first2" || true
exit "$code"
"""
_NODE = f"""
set -eu
node=$1
shift
mount --bind "$FOLDER/ray$node" "$RAY_TMPDIR"
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done
ip addr add "{NETWORK}.$node/24" dev eth0
ip link set eth0 up
"$@"
"""
_RAY = """
import sys
from ray.scripts.scripts import main
if sys.argv[1] == "start":  # without what needs time and is not tested; `ray symmetric-run` has no such options
    sys.argv.append("--include-log-monitor=false")
    sys.argv += ["--include-dashboard=false", "--no-monitor"] if "--head" in sys.argv else []
main()
"""


def skip_without_namespaces() -> None:
    """Skips the test where a user may not make networks of its own."""
    try:
        done = subprocess.run(
            [*_FIRST, "ip", "link", "add", "port1", "type", "veth", "peer", "name", "port2"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        pytest.skip(f"no namespaces here: {error}")
    if done.returncode:
        pytest.skip(f"no namespaces here: {done.stderr.strip()}")


def run_on_two_machines(folder: Path, command: Sequence[str], variables: Mapping[str, str]) -> tuple[int, list[str]]:
    """Runs the same command on two machines, 10.77.0.1 and 10.77.0.2, which share this machine's files.

    Args:
        folder: for the logs; it is made.

    Returns:
        The exit code of the first machine's, and what each said.
    """
    for name in ("bin", "ray1", "ray2"):
        (folder / name).mkdir(parents=True)
    (folder / "node.sh").write_text(_NODE)
    (folder / "ray_bootstrap_config.yaml").write_text("{}\n")  # or a head asks which cloud it is in
    (folder / "bin" / "ray").write_text(f"#!{sys.executable}\n{_RAY}")
    (folder / "bin" / "ray").chmod(0o755)
    with TemporaryDirectory(prefix="ray") as ray_folder:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TESTS_"))},
            "FOLDER": str(folder),
            "HOME": str(folder),
            "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "RAY_TMPDIR": ray_folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_metrics_collection": "false",
            "RAY_agent_register_timeout_ms": "300000",  # on a busy machine
            **variables,
        }
        done = subprocess.run(
            [*_FIRST, "sh", "-c", _BRIDGE, "bridge", *command],
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
    said = [(folder / f"{node}.log").read_text(errors="replace") for node in (1, 2)]
    return done.returncode, [said[0] + done.stderr, said[1]]
