"""What is said where Ray cannot be reached or started; Ray itself is not started."""

import pytest

from pipeline.errors import MachineError
from pipeline.executors import ray_cluster


@pytest.mark.parametrize(
    ("address", "why", "message"),
    [
        (None, "AF_UNIX path length cannot exceed 107 bytes: /scratch", "set RAY_TMPDIR to a short one, such as /tmp"),
        (None, "no port is free", r"a local Ray: cannot be started \(no port is free\); use --executor local"),
        ("10.0.0.1:6379", "refused", r"--address 10.0.0.1:6379: cannot be reached \(refused\); check the address"),
    ],
)
def test_a_ray_that_does_not_start_says_what_helps(
    monkeypatch: pytest.MonkeyPatch, address: str | None, why: str, message: str
) -> None:
    import ray

    def fail(**_: object) -> None:
        raise OSError(why)

    monkeypatch.setattr(ray, "init", fail)
    for name in ("check_joinable", "ask_head"):
        monkeypatch.setattr(ray_cluster, name, lambda _: None)
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MachineError, match=message):
        ray_cluster.connect(1, address)
