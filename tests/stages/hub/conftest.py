"""A hub of this machine for the tests of push and pull."""

from collections.abc import Iterator

import pytest

from tests.hub_server import Hub, local_hub


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub that commands of this process talk to."""
    with local_hub(tmp_path_factory.mktemp("hub-cache")) as hub:
        yield hub
