"""Files of weights: .safetensors only, as other formats run code when they are loaded."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.errors import ConfigError, MachineError
from pipeline.storage.files import file_digest
from stages.places import local_file

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def weights_digest(field: str, path: str) -> str:
    """SHA-256 of the file that `field` of the configuration names.

    Raises:
        ConfigError: it has another format.
        MachineError: it cannot be read.
    """
    if Path(path).suffix != ".safetensors":
        raise ConfigError(
            f"{field}: {path}: give weights in .safetensors (docs/how-to/evaluation.md converts .pth); TorchScript "
            "archives are not read, as loading one runs code from the file"
        )
    try:
        return file_digest(local_file(path))
    except OSError as error:
        raise MachineError(f"{field}: {path} cannot be read ({error.strerror or error}); check the path") from error


def load_weights(field: str, path: str, make: "Callable[[Mapping[str, Tensor]], T]") -> T:
    """Calls `make` with the file's tensors; `make` raises ValueError if they do not fit.

    Raises:
        MachineError: the file cannot be read, or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return make(load_file(local_file(path)))
    except (SafetensorError, ValueError) as error:
        raise MachineError(
            f"{field}: {path}: {error}; docs/how-to/evaluation.md says where the weights are from"
        ) from error
