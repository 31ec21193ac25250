"""Run as a script: opens an exported folder in a process that cannot import this repository's packages.

Reads from stdin what to call the pipeline with, as JSON; prompt embeddings come from a safetensors file. Writes the
images as a NumPy file.
"""

import json
import sys
from importlib.machinery import ModuleSpec
from typing import Any

OURS = ("imagen_core", "stages", "pipeline", "workflows", "tests", "benchmarks")


class Refuse:
    """Comes before all other finders."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] in OURS:
            raise ImportError(f"{name} must not be imported")
        return None


def main(folder: str, out: str) -> None:
    import diffusers
    import numpy as np
    from safetensors.torch import load_file

    options = json.load(sys.stdin)
    if "embeds" in options:
        tensors = load_file(options.pop("embeds"))
        options["prompt_embeds"] = [tensors[name] for name in sorted(tensors)]
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(  # pyright: ignore[reportPrivateImportUsage]
        folder, trust_remote_code=True, **options.pop("load", {})
    )
    pipe.set_progress_bar_config(disable=True)
    np.save(out, pipe(output_type="np", **options).images)
    assert not any(name.partition(".")[0] in OURS for name in sys.modules)


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuse())  # type: ignore[arg-type]
    main(*sys.argv[1:])
