"""Where a run's files lie: a local folder, or an object store such as `s3://` or `gs://`."""

from pipeline.storage.base import BackgroundTasks, Storage, parallel_map
from pipeline.storage.local import LocalStorage
from pipeline.storage.objects import ObjectStorage
from pipeline.storage.open import open_storage

__all__ = ["BackgroundTasks", "LocalStorage", "ObjectStorage", "Storage", "open_storage", "parallel_map"]
