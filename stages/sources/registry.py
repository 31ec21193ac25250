"""The union of all sources, picked by `source.kind`."""

from typing import Annotated

from pydantic import Field

from stages.sources.folder import FolderConfig
from stages.sources.huggingface import HuggingfaceConfig
from stages.sources.parquet import ParquetConfig
from stages.sources.synthetic.source import SyntheticConfig
from stages.sources.tars import WebdatasetConfig
from stages.sources.tsv import TsvConfig
from stages.sources.urls import UrlsConfig

AnySource = Annotated[
    SyntheticConfig | UrlsConfig | FolderConfig | WebdatasetConfig | ParquetConfig | TsvConfig | HuggingfaceConfig,
    Field(discriminator="kind"),
]
