import pytest


@pytest.fixture(autouse=True)
def wait_for_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, a page shows all samples."""
    monkeypatch.setattr("stages.browse.store.pages._WAIT_S", 120.0)
