from collections.abc import Callable
from pathlib import Path

import pytest

from imagen_core import store as st
from tests.imagen_core.store.handmade_store import Made, make_store


@pytest.fixture(params=["parquet", "hdf5"])
def store_format(request: pytest.FixtureRequest) -> st.StoreFormat:
    return request.param


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    """make(**options) writes a store to tmp_path / "store", or to tmp_path / name."""
    return lambda name="store", **options: make_store(tmp_path / name, **options)
