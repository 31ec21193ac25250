#!/usr/bin/env bash
# A Ray on one machine, without a dashboard and with usage statistics off, asks which cloud it is in.
#
# `ray.init(address="local", include_dashboard=False)` of Ray 2.60.0 still starts an API server, with one module,
# UsageStatsHead. Its `run` calls `get_cluster_config_to_report` before it looks at RAY_USAGE_STATS_ENABLED, and that asks
# Azure's, Google's and AWS's metadata in turn, unless ~/ray_bootstrap_config.yaml exists. Where such requests raise an
# alarm or wait for a timeout, no documented setting stops them. `pipeline run` starts no API server
# (`without_needless_processes` in pipeline/executors/ray_cluster.py).
#
# Nothing is sent: an audit hook in Ray's processes refuses each attempt and writes it down. Prints the attempts; fails if
# they are not those seen on 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.60.0
mkdir "$folder/guard" "$folder/home"
cat >"$folder/guard/sitecustomize.py" <<'PYTHON'
import ipaddress
import os
import sys


def refuse(event, arguments):
    if event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        return
    place = arguments[0] if event.startswith("socket.get") else arguments[1]
    host = place[0] if isinstance(place, tuple) else place
    if not isinstance(place, tuple) and not event.startswith("socket.get"):
        return  # a Unix socket
    host = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    try:
        outside = not ipaddress.ip_address(host).is_loopback
        outside = outside and event == "socket.connect"  # an address in figures is not looked up
    except ValueError:
        outside = host != "localhost"
    if outside:
        with open(os.environ["ATTEMPTS"], "a") as file:
            file.write(f"{os.path.basename(sys.argv[0])} {event} {host}\n")
        raise OSError("refused")


sys.addaudithook(refuse)
PYTHON
export PYTHONPATH="$folder/guard" ATTEMPTS="$folder/attempts" HOME="$folder/home"
export RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # the latter: loopback only
export RAY_raylet_start_wait_time_s=300 # on a busy machine
touch "$ATTEMPTS"
"$folder/venv/bin/python" - <<'PYTHON'
import os
import time

import ray

ray.init(address="local", include_dashboard=False, num_cpus=1, log_to_driver=False)
asked = []
for _ in range(120):
    asked = open(os.environ["ATTEMPTS"]).read().splitlines()
    if len(asked) >= 3:
        break
    time.sleep(1)
ray.shutdown()
print("\n".join(asked))
EXPECTED = [
    "dashboard.py socket.connect 169.254.169.254",
    "dashboard.py socket.getaddrinfo metadata.google.internal",
    "dashboard.py socket.connect 169.254.169.254",
]
assert asked == EXPECTED, f"Ray has changed: {asked}"
PYTHON
