"""Every kind of text cache, picked by `kind`."""

from typing import Annotated

from imagen_core.extensions import Kinds
from stages.sources.caches.base import CacheConfig
from stages.sources.caches.kohya import KohyaCacheConfig
from stages.sources.caches.musubi import MusubiCacheConfig
from stages.sources.caches.pixart import PixartCacheConfig
from stages.sources.caches.simpletuner import SimpletunerCacheConfig

AnyCache = Annotated[
    PixartCacheConfig  # one line for each
    | KohyaCacheConfig
    | MusubiCacheConfig
    | SimpletunerCacheConfig,
    Kinds("pipeline.caches", CacheConfig),
]
"""A text cache; other packages add kinds by entry points in `pipeline.caches`."""
