from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.imagen_core.train.small import make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("train") / "store")


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Before any other fixture: small tensors are slow in many threads, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
