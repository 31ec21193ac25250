"""Do the tools read the files that `pipeline schedule` writes for them?

For SkyPilot, dstack and Kubeflow Trainer: their packages, each installed in an environment of its own, read the files,
and refuse them with an unknown key. For Kubernetes resources: `--crds 'NAME VERSION=FOLDER'`, a folder with the
CustomResourceDefinitions of a release as YAML; unknown fields are errors, as for `kubectl apply`.

python -m benchmarks.places --work evidence-run/places --out benchmarks/results/places.json
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import report
from pipeline.deploy.schedule import KINDS, Schedule, render

PACKAGES = {"skypilot": ["skypilot"], "dstack": ["dstack"], "kubeflow": ["kubeflow-trainer-api", "PyYAML"]}
ON_KUBERNETES = ("kuberay", "kueue", "raycronjob", "kubeflow")
VALUES = (
    'source.path=/data/it\'s a "test"',
    "a=$(touch pwned) `touch pwned` $HOME ${HOME} $$ ${{ run.args }}",
    "b=100%h %% %n \\n \\ ; & # | > : - * {{ 7 * 7 }} ü 😀",
)
"""Values that mean something in a shell, in YAML or to a tool that expands variables."""


def write_files(kind: str, folder: Path) -> list[Path]:
    """The files of a kind: with a configuration, a volume and hostile values; with none of these; with a queue."""
    config = folder / "my config.yaml"
    config.write_text("shard_size: 7\n", encoding="utf-8")
    workflow = "train" if KINDS[kind].workflows else "precompute"
    always = {"image": "registry/pipeline:1", **({"queue": "team"} if "queue" in KINDS[kind].needs else {})}
    cases: list[dict[str, Any]] = [
        {"config": str(config), "out": "/mnt/my data/run 1", "overrides": VALUES},
        {"out": "s3://bucket/run1"},
    ]
    if "queue" in KINDS[kind].uses:
        cases.append({"out": "s3://bucket/run1", "queue": "team"})
    paths = []
    for number, case in enumerate(cases):
        for name, text in render(Schedule(kind, workflow, **{**always, **case})).items():
            paths.append(folder / f"{kind}-{number}-{name}")
            paths[-1].write_text(text, encoding="utf-8")
    return paths


def read_with_package(place: str, folder: Path) -> dict[str, Any]:
    """Lets the place's package read the files, in an environment that has only that; one made before is used again."""
    environment = folder / f"{place}-environment"
    python, is_whole = environment / "bin" / "python", environment / "whole"
    if not is_whole.exists():
        venv.create(environment, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES[place]], check=True)
        is_whole.touch()
    script = Path(__file__).with_name("places_read.py")
    paths = write_files(place, folder)
    done = subprocess.run(
        [python, "-P", script, place, *paths],  # else our benchmarks are found in place of packages
        env={**os.environ, "HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{place}: {done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {"kind": place, "by": found.pop("version"), "files": len(paths), **found}


def strict(schema: Any) -> Any:
    """A resource's schema in which an unknown field is an error, but where any is allowed."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if schema.get("type") == "object" and schema.get("properties") and not is_open:
        found.setdefault("additionalProperties", False)
    return found


def read_definitions(folder: Path) -> Iterator[tuple[tuple[str, str], Any]]:
    """`apiVersion` and `kind` of each resource that a folder defines, and its schema."""
    for path in sorted(folder.glob("*.yaml")):
        for tree in yaml.load_all(path.read_text(encoding="utf-8"), yaml.CSafeLoader):
            if tree and tree["kind"] == "CustomResourceDefinition":
                for each in tree["spec"]["versions"]:
                    schema = each["schema"]["openAPIV3Schema"]
                    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
                    yield (f"{tree['spec']['group']}/{each['name']}", tree["spec"]["names"]["kind"]), strict(schema)


def read_with_definitions(release: str, folder: Path, work: Path) -> list[dict[str, Any]]:
    """Every manifest of ours whose resources the release defines, against its schemas; with an unknown field, too."""
    from jsonschema import Draft202012Validator

    schemas = dict(read_definitions(folder))
    results = []
    for kind in ON_KUBERNETES:
        paths = write_files(kind, work)
        trees = [tree for path in paths for tree in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
        known = [(schemas[key], tree) for tree in trees if (key := (tree["apiVersion"], tree["kind"])) in schemas]
        slips = refused = 0
        for schema, tree in known:
            validator = Draft202012Validator(schema)
            for error in validator.iter_errors(tree):
                sys.exit(f"{release}: {kind}: {error.json_path}: {error.message}")
            for wrong in (tree | {"slip": 1}, tree | {"spec": tree["spec"] | {"slip": 1}}):
                slips += 1
                refused += not validator.is_valid(wrong)
        if known:
            counts = {"files": len(paths), "documents": len(known), "slips": slips, "slips_refused": refused}
            results.append({"kind": kind, "by": f"{release}, its CustomResourceDefinitions", **counts})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments and files")
    parser.add_argument("--crds", action="append", default=[], metavar="'NAME VERSION=FOLDER'")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    results = [read_with_package(place, work) for place in PACKAGES]
    for given in options.crds:
        release, _, folder = given.partition("=")
        results += read_with_definitions(release, Path(folder), work)
    for result in results:
        print(json.dumps(result), flush=True)
    report("places", results, {}, options.out, packages=["PyYAML", "jsonschema"])
    if any(result["slips_refused"] != result["slips"] for result in results):
        sys.exit("a file with an unknown key was not refused")


if __name__ == "__main__":
    main()
