"""Every source, picked by `source.kind`."""

from typing import Annotated, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from imagen_core.extensions import Kinds
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.storage.run_folder import CONFIG, RunFolder
from stages.sources.base import Source
from stages.sources.folder import FolderConfig
from stages.sources.huggingface import HuggingfaceConfig
from stages.sources.mds.source import MdsConfig
from stages.sources.parquet import ParquetConfig
from stages.sources.synthetic.source import SyntheticConfig
from stages.sources.tars import WebdatasetConfig
from stages.sources.tsv import TsvConfig
from stages.sources.urls import UrlsConfig

AnySource = Annotated[
    SyntheticConfig  # one line for each
    | UrlsConfig
    | FolderConfig
    | WebdatasetConfig
    | ParquetConfig
    | TsvConfig
    | HuggingfaceConfig
    | MdsConfig,
    Kinds("pipeline.sources", Config),
]
"""A source; other packages add kinds by entry points in `pipeline.sources`."""


def source_of_run(run: RunFolder) -> Source:
    """The source that the configuration in a run folder names; it is not opened.

    Raises:
        ConfigError: the configuration has no source.
    """
    try:
        tree: Any = yaml.safe_load(run.storage.read(CONFIG))
        config = TypeAdapter[AnySource](AnySource).validate_python(tree["source"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValidationError) as error:
        raise ConfigError(f"{run.url}/{CONFIG}: has no source that can be read: {error}; restore the file") from error
    return config.build()
