"""Loads the weights of a model through transformers, and refuses to make up the missing ones."""

from typing import Any

from pipeline.errors import MachineError
from stages.encoders.model_files import ModelFiles

_UNUSED = ("pooler.",)  # never read here, and absent from many checkpoints


def load_weights(model_class: Any, files: ModelFiles, dtype: Any, device: Any) -> Any:
    """`model_class.from_pretrained`, ready for inference.

    Raises:
        MachineError: weights are missing; transformers would go on with random numbers in their place.
    """
    model, report = model_class.from_pretrained(
        files.model, revision=files.revision or "main", dtype=dtype, output_loading_info=True
    )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(_UNUSED))
    if missing:
        raise MachineError(
            f"encoders.model: {files.model} lacks {len(missing)} weights of a {type(model).__name__} "
            f"({', '.join(missing[:3])} ...); give a folder with the whole encoder"
        )
    return model.to(device).eval().requires_grad_(False)
