"""The bounds of the optional dependencies meet; `benchmarks/resolve.py` lets pip search from nothing."""

import tomllib
from importlib.metadata import requires, version

from packaging.requirements import Requirement

from tests.runs import REPOSITORY

_PINNED = {"fsspec", "s3fs", "aiobotocore", "botocore", "boto3", "s3transfer", "huggingface-hub"}
"""Packages that others of these want in exact versions."""


def test_the_bounds_of_s3_and_hugging_face_and_of_the_test_server_meet() -> None:
    """Shown by one set of versions: what is installed here."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras["s3"]) < set(extras["dev"]), "or this environment shows nothing"
    wanted = [Requirement(text) for text in (*extras["s3"], *extras["huggingface"], "moto[s3,server]")]
    names = {requirement.name for requirement in wanted} | _PINNED
    for package in names:
        wanted += [Requirement(text) for text in requires(package) or []]
    bounds = [r for r in wanted if r.name in names and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    assert len(bounds) > 10
    assert [str(r) for r in bounds if version(r.name) not in r.specifier] == []


def test_the_client_of_s3_is_bounded_where_pip_would_search_its_old_versions() -> None:
    """Each version of aiobotocore wants three of botocore's, and boto3 the newest."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    bound = next(Requirement(text) for text in extras["s3"] if text.startswith("aiobotocore"))
    assert "3.9.2" not in bound.specifier
    assert version("aiobotocore") in bound.specifier
