"""Credentials are refused in URLs and removed from messages."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.storage.credentials import check_no_credentials, without_secrets

LOGINS = [
    ("s3://me:hidden@bucket/run", "s3://...@bucket/run"),
    ("https://hidden@host/list.csv", "https://...@host/list.csv"),
    ("s3://me:hid@den@bucket/run", "s3://...@bucket/run"),
    ("s3://ME:hid/den@bucket/run", "s3://...@bucket/run"),
    ("s3://ME:/hidden@bucket/run", "s3://...@bucket/run"),
    ("s3://ME:12/hidden@bucket/run", "s3://...@bucket/run"),
    ("https://me:hid?den#x@host/list.csv", "https://...@host/list.csv"),
    ("simplecache::s3://me:hidden@bucket/a.tar", "simplecache::s3://...@bucket/a.tar"),
    ("zip://*.csv::https://me:hid/den@host/a.zip", "zip://*.csv::https://...@host/a.zip"),
    ("zip://*.csv::simplecache::ftp://me:hidden@host/a.zip", "zip://*.csv::simplecache::ftp://...@host/a.zip"),
    ("zip://a@b.csv::https://hidden@host/a.zip", "zip://a@b.csv::https://...@host/a.zip"),
    ("https://proxy/?url=https://me:hidden@host/", "https://proxy/?url=https://...@host/"),
    ("abfs://box:hidden@account/x", "abfs://...@account/x"),
    ("ray://me:hidden@head:10001", "ray://...@head:10001"),
    ("HTTPS://Me:hidden@host/", "HTTPS://...@host/"),
]
SIGNED = [
    ("https://b.s3.amazonaws.com/l.csv?X-Amz-Date=1&X-Amz-Signature=hidden", "?X-Amz-Date=1&X-Amz-Signature=..."),
    ("https://h/l.csv?X-Amz-Credential=hidden%2F1&a=b", "?X-Amz-Credential=...&a=b"),
    ("https://h/l.csv?X-Amz-Security-Token=hidden", "?X-Amz-Security-Token=..."),
    ("https://h/l.csv?x-goog-signature=hidden", "?x-goog-signature=..."),
    ("https://a.blob.core.windows.net/l.csv?sv=1&sig=hidden%3D&se=2", "?sv=1&sig=...&se=2"),
    (
        "https://h/l.csv?AWSAccessKeyId=hidden&Expires=1&Signature=hidden",
        "?AWSAccessKeyId=...&Expires=1&Signature=...",
    ),
    ("https://h/l.csv?Policy=p&Key-Pair-Id=hidden", "?Policy=p&Key-Pair-Id=..."),
    ("https://h/l.csv?token=hidden", "?token=..."),
    ("https://h/l.csv#access_token=hidden", "#access_token=..."),
    ("https://h/l.csv?api_key=hidden;x=1", "?api_key=...;x=1"),
    ("zip://x::simplecache::https://h/a.zip?sig=hidden", "?sig=..."),
]
PLAIN = [
    "s3://bucket/a@b.csv",
    "https://host?mail=a@b",
    "https://host#a@b",
    "https://host:8080/a@b.csv",
    "https://[::1]:8080/a@b.csv",
    "https://[::1]/a@b.csv",
    "http://HEAD:8265",
    "user@host",
    "/data/a@b",
    "simplecache::s3://bucket/a@b.csv",
    "zip://a.csv::https://host/x@y.zip",
    "zip://*.csv::simplecache::https://host:80/x@y.zip",
    "hf://datasets/me/data@main/a.parquet",
    "abfs://container@account.dfs.core.windows.net/a",
    "github://me:repository@main/a.csv",
    "https://h/l.csv?signal=1&key=a.csv&design=2&monkey=3",
    "a caption: what://is this? me@home",
    "https://h/l.csv?sig=&a=1",
]


@pytest.mark.parametrize(("url", "shown"), LOGINS)
def test_a_url_with_a_user_or_password_is_refused_without_showing_any_of_it(url: str, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_no_credentials(url, "source.path")
    assert str(caught.value).startswith(f"source.path: {shown}: holds a user or password; remove it")
    assert "hid" not in str(caught.value)


@pytest.mark.parametrize(("url", "shown"), SIGNED)
def test_a_signed_url_is_refused_without_showing_its_signature(url: str, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_no_credentials(url, "source.path")
    assert f"{shown}: holds a signature or a token; " in str(caught.value)
    assert "hid" not in str(caught.value)


@pytest.mark.parametrize("url", PLAIN)
def test_what_is_no_credential_passes_and_stays_as_it_is(url: str) -> None:
    check_no_credentials(url, "--out")
    assert without_secrets(f"cannot read {url}: no") == f"cannot read {url}: no"


@pytest.mark.parametrize("url", [url for url, _ in LOGINS + SIGNED])
def test_urls_in_messages_are_shown_without_credentials(url: str) -> None:
    said = without_secrets(f"OSError: '{url}' and then <{url}>, {Path(url)}, {url}")
    assert "hid" not in said
    assert said.startswith("OSError: '")
    assert without_secrets(said) == said


def test_values_of_variables_named_like_secrets_are_removed_from_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_SECRET", "0123456789")
    assert without_secrets("denied: 0123456789") == "denied: <STORE_SECRET>"
