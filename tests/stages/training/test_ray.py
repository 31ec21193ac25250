"""What Ray Train reports of a worker's end, without starting Ray."""

import pickle

import pytest

from imagen_core.store import StoreError
from imagen_core.train import CheckpointError, StoreLostError
from stages.training.ray import _own_error


class _Wrapped(Exception):
    """As Ray Train hands over what a worker raised."""

    def __init__(self, error: BaseException) -> None:
        self._base_exc = error


class _WorkersFailed(Exception):
    def __init__(self, failures: dict[int, BaseException]) -> None:
        self.worker_failures = failures


@pytest.mark.parametrize("error", [StoreLostError("lost", again=True), CheckpointError("damaged"), StoreError("none")])
def test_an_error_of_the_trainer_in_a_worker_is_the_error_of_the_training(error: Exception) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    found = _own_error(_WorkersFailed({0: _Wrapped(RuntimeError("peer left")), 1: _Wrapped(arrived)}))
    assert type(found) is type(error)
    assert (str(found), vars(found)) == (str(error), vars(error))


def test_a_worker_that_died_has_no_error_of_the_trainer() -> None:
    assert _own_error(_WorkersFailed({0: _Wrapped(RuntimeError("peer left"))})) is None
    assert _own_error(RuntimeError("the controller failed")) is None
