"""Do the optional dependencies fit together, and beside what people install with them?

Each combination of extras is resolved from nothing by pip, as for an empty environment; nothing is installed. An
object store's library wants exact versions of packages that the test server and the Hugging Face libraries want too.

python -m benchmarks.resolve --out benchmarks/results/resolve.json
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import report

REPOSITORY = Path(__file__).resolve().parents[1]
COMBINATIONS = (
    ("[s3,huggingface]", "moto[s3,server]"),
    ("[gs,huggingface]",),
    ("[s3,gs,huggingface,tensorboard,wandb]",),
)
_SHOWN = ("fsspec", "s3fs", "gcsfs", "aiobotocore", "botocore", "boto3", "datasets", "huggingface_hub", "moto")


def resolve(requirements: Sequence[str], limit_s: float) -> dict[str, Any]:
    """What pip would install for these requirements; the first is extras of this project, as `[s3]`."""
    wanted = [f"{REPOSITORY}{requirements[0]}", *requirements[1:]]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    result: dict[str, Any] = {"requirements": list(requirements), "resolved": False}
    started = time.perf_counter()
    try:
        done = subprocess.run([*command, *wanted], capture_output=True, text=True, timeout=limit_s, cwd="/")
    except subprocess.TimeoutExpired:
        return result | {"error": f"pip found no versions within {limit_s:g} s"}
    result["seconds"] = round(time.perf_counter() - started, 1)
    if done.returncode:
        return result | {"error": done.stderr.strip()[-2000:]}
    found = {_name(entry["metadata"]["name"]): entry["metadata"]["version"] for entry in _installed(done.stdout)}
    return result | {
        "resolved": True,
        "packages": len(found),
        "versions": {name: found[name] for name in _SHOWN if name in found},
    }


def _installed(text: str) -> list[dict[str, Any]]:
    return json.loads(text)["install"]


def _name(package: str) -> str:
    return re.sub(r"[-.]+", "_", package).lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-s", type=float, default=1800.0, help="longest search of a combination")
    parser.add_argument("--most", type=int, default=len(COMBINATIONS), help="combinations to try")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    results = []
    for requirements in COMBINATIONS[: options.most]:
        print(f"{' '.join(requirements)} ...", flush=True)
        results.append(resolve(requirements, options.limit_s))
        print(json.dumps(results[-1]), flush=True)
    report("resolve", results, {}, options.out, packages=["pip"])
    if not all(result["resolved"] for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
