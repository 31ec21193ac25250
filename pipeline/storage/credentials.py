"""Refuses credentials in what is written into files and logs."""

from imagen_core.far import is_signed, without_logins, without_secrets
from pipeline.errors import ConfigError


def check_no_credentials(text: str, field: str) -> None:
    """Refuses a text with a URL, or a chain of them, that holds credentials: it would be written into files and logs.

    Raises:
        ConfigError: a URL in it has a user or password, or is signed.
    """
    plain = without_logins(text)
    if plain != text:
        raise ConfigError(
            f"{field}: {without_secrets(plain)}: holds a user or password; remove it and set it in the environment "
            "(for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role; for the head of a Ray "
            "cluster: RAY_AUTH_TOKEN_PATH or RAY_JOB_HEADERS)"
        )
    if is_signed(text):
        raise ConfigError(
            f"{field}: {without_secrets(text)}: holds a signature or a token; give the URL without it, with "
            "credentials in the environment, or a copy of the file"
        )
