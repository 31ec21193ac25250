"""Reads the files of one place with that place's own package, which is installed beside it; started by `places.py`.

python places_read.py skypilot|dstack|kubeflow FILE ...
"""

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

Read = Callable[[Any], None]


def skypilot() -> Read:
    """SkyPilot's schemas of tasks and resources, as strict as its server is, and its task itself."""
    os.environ.update(SKYPILOT_DISABLE_USAGE_COLLECTION="1", IS_SKYPILOT_SERVER="1")
    import sky
    from sky.server import plugins

    plugins.plugins_loaded = lambda: True  # from then on a server refuses unknown keys of `job_recovery`

    def read(tree: Any) -> None:
        task = sky.Task.from_yaml_config(copy.deepcopy(tree))
        assert (task.name, task.num_nodes, task.run) == (tree["name"], tree["num_nodes"], tree["run"])
        for resources in task.resources:
            assert resources.use_spot
            assert resources.job_recovery.items() >= tree["resources"]["job_recovery"].items()
            assert resources.extract_docker_image() == tree["resources"]["image_id"].removeprefix("docker:")
        assert set(task.volumes) == set(tree.get("volumes", {}))
        assert (task.file_mounts or {}) == tree.get("file_mounts", {})

    return read


def dstack() -> Read:
    """dstack's configuration of a task, and what its command line puts in place of `${{ ... }}`."""
    from dstack._internal.core.models.configurations import TaskConfiguration, parse_apply_configuration
    from dstack._internal.utils.interpolator import VariablesInterpolator

    expand = VariablesInterpolator({"run": {"args": "pwned"}}, skip=["secrets", "groups"]).interpolate_or_error

    def read(tree: Any) -> None:
        task = parse_apply_configuration(copy.deepcopy(tree))
        assert isinstance(task, TaskConfiguration)
        assert task.commands == tree["commands"]
        assert [expand(command) for command in task.commands] == task.commands
        assert [event.value for event in task.retry.on_events] == tree["retry"]["on_events"]
        assert (task.name, task.image, task.nodes) == (tree["name"], tree["image"], tree["nodes"])

    return read


def kubeflow() -> Read:
    """Kubeflow's models of its resources, which drop unknown fields: what they write must be what they read."""
    from kubeflow_trainer_api import models

    kinds = {
        "TrainJob": models.TrainerV1alpha1TrainJob,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
        "ConfigMap": None,
    }

    def read(tree: Any) -> None:
        model = kinds[tree["kind"]]
        assert model is None or model.from_dict(copy.deepcopy(tree)).to_dict() == tree

    return read


PLACES = {
    "skypilot": (skypilot, ["skypilot"], [("slip",), ("resources", "slip"), ("resources", "job_recovery", "slip")]),
    "dstack": (dstack, ["dstack"], [("slip",), ("resources", "slip"), ("retry", "slip")]),
    "kubeflow": (kubeflow, ["kubeflow_trainer_api"], [("slip",), ("spec", "slip")]),
}
"""Functions that read, packages, and keys that none of them knows."""


def slips(tree: Any, keys: list[tuple[str, ...]]) -> Iterator[Any]:
    """The tree with an unknown key, for each of them."""
    for *above, last in keys:
        wrong = found = copy.deepcopy(tree)
        for key in above:
            found = found[key]
        found[last] = "x"
        yield wrong


def refuses(read: Read, tree: Any) -> bool:
    try:
        read(tree)
    except Exception:  # noqa: BLE001 each package has its own
        return True
    return False


def main() -> None:
    place, *paths = sys.argv[1:]
    start, packages, keys = PLACES[place]
    read = start()
    trees = [tree for path in paths for tree in yaml.safe_load_all(Path(path).read_text(encoding="utf-8"))]
    for tree in trees:
        read(tree)
    wrong = [slip for tree in trees if tree.get("kind") != "ConfigMap" for slip in slips(tree, keys)]
    result = {
        "version": ", ".join(f"{package} {version(package)}" for package in packages),
        "documents": len(trees),
        "slips": len(wrong),
        "slips_refused": sum(refuses(read, slip) for slip in wrong),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
