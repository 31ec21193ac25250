"""Every source, picked by `source.kind`."""

from typing import Annotated

from imagen_core.extensions import Kinds
from pipeline.config import Config
from stages.sources.folder import FolderConfig
from stages.sources.huggingface import HuggingfaceConfig
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
    | HuggingfaceConfig,
    Kinds("pipeline.sources", Config),
]
"""A source; other packages add kinds by entry points in `pipeline.sources`."""
