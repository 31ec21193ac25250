"""What is done about duplicates."""

from typing import Any, Literal

from pydantic import model_validator

from pipeline.config import Config


class DuplicatesConfig(Config):
    """Equal images, near duplicates, and images that must not be in training; `report` and `drop` alone set the
    action."""

    action: Literal["report", "drop"] = "report"
    """report: they stay samples, and RUN/duplicates.jsonl names them; drop: only the first of them, by shard and row,
    stays one. May be changed at any time: the same command again writes only the manifest again."""
    near: bool = True
    """Also find images that are equal but for compression, size, mirroring or a crop of up to 5 % of each side."""
    exclude: tuple[str, ...] = ()
    """Images that must not be in training, such as an evaluation set: folders of images, stores or run folders, and
    text files with one SHA-256 per line, of image files or of decoded pixels."""

    @model_validator(mode="before")
    @classmethod
    def _action_alone(cls, value: Any) -> Any:
        return {"action": value} if isinstance(value, str) else value
