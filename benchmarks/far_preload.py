"""What the fork server of `far_process.py` imports, once for all processes. Nothing is run."""

import contextlib
import gc
import importlib
import pkgutil

from benchmarks.far_process import PACKAGES

_OTHERS = (
    *("torch", "torch._dynamo", "h5py", "webdataset", "pyarrow.parquet", "pyarrow.dataset"),
    *("transformers", "transformers.models.t5.modeling_t5", "transformers.models.clip.modeling_clip", "tokenizers"),
    *("s3fs", "aiobotocore.session", "tenacity", "jinja2", "matplotlib.figure", "PIL.Image", "PIL.PngImagePlugin"),
    *("safetensors.torch", "safetensors.numpy", "tests.stages.encoders.tiny_models", "benchmarks.far_scenarios"),
)


def _load() -> None:
    names = list(_OTHERS)
    for package in map(importlib.import_module, PACKAGES):
        names += [name for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    for name in names:
        if not name.endswith("__main__"):
            with contextlib.suppress(Exception):  # a package that is not installed
                importlib.import_module(name)
    gc.collect()
    gc.freeze()


_load()
