"""Files of `torch.save`, of which nothing is run: they are read if they are tensors and plain data alone."""

import re
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO
from zipfile import is_zipfile

_OBJECT = re.compile(r"GLOBAL ([\w.]+)")


class NotTensorsError(Exception):
    """A file that is damaged, or holds more than tensors and plain data; its text is the rest of "the file ..."."""


def read_torch_file(file: Path | BinaryIO) -> Any:
    """The content of a file of `torch.save`. Of a file on disk only the tensors that are used are read into memory.

    Raises:
        NotTensorsError: it holds something else, or is damaged.
        OSError: there is no such file, or it may not be read.
    """
    import torch

    mapped = isinstance(file, Path) and is_zipfile(file)  # torch cannot map a file of its older format
    try:
        with warnings.catch_warnings(action="ignore"):  # about the protocol of a pickle
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        if found := _OBJECT.search(str(error)):
            words = f"holds a {found[1]}, which is no tensor, and of which nothing was run"
        else:
            words = "is no file of torch.save, or holds more than tensors"
        raise NotTensorsError(words) from error
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # torch has no class for damaged files: LookupError, RuntimeError, ValueError ...
        raise NotTensorsError("is damaged, or no file of torch.save") from error
