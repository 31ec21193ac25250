"""Credentials are refused in URLs and removed from messages."""

import pytest

from pipeline.errors import ConfigError
from pipeline.storage.credentials import check_no_credentials, without_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://me:hidden@bucket/run", "s3://...@bucket/run"),
        ("https://hidden@host/list.csv", "https://...@host/list.csv"),
        ("s3://me:hid@den@bucket/run", "s3://...@bucket/run"),
    ],
)
def test_a_url_with_a_user_or_password_is_refused_without_showing_any_of_it(url: str, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_no_credentials(url, "source.path")
    assert str(caught.value).startswith(f"source.path: {shown}: holds a user or password; remove it")
    assert "hid" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://bucket/a@b.csv", "https://host?mail=a@b", "https://host#a@b", "user@host", "/data/a@b"]
)
def test_an_at_sign_after_the_host_is_no_password(url: str) -> None:
    check_no_credentials(url, "--out")


def test_values_of_variables_named_like_secrets_are_removed_from_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_SECRET", "0123456789")
    assert without_secrets("denied: 0123456789") == "denied: <STORE_SECRET>"
