"""The encoder that is said to have made embeddings which came with the data: `verify --encoder NAME=CONFIG`."""

from pipeline.config import Config, load_config, local_path, parse_yaml, read_yaml
from pipeline.errors import ConfigError
from stages.encoders.registry import AnyEncoder


class _Stated(Config):
    encoder: AnyEncoder


def stated_encoder(name: str, text: str) -> AnyEncoder:
    """The configuration of an encoder.

    Args:
        name: of the encoder in the store.
        text: a YAML mapping in braces, or the path of a file with one.
    Raises:
        ConfigError: it is no such configuration.
    """
    option = f"--encoder {name}=..."
    is_inline = text.lstrip().startswith("{")
    tree = parse_yaml(text.encode(), option) if is_inline else read_yaml(local_path(text, option))
    try:
        return load_config(_Stated, {"encoder": {**tree, "name": name}}).encoder
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from error
