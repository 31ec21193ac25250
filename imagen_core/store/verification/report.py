"""What `verify_store` finds."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of one file; `file` is relative to the store."""

    file: str
    message: str


@dataclass(slots=True)
class VerifyReport:
    """The result of `verify_store`.

    Attributes:
        ok: no problems; warnings do not count.
        files_checked, bytes_checked: number of files read to the end, and their bytes, including the manifest.
        input_rows: rows of the source. Each is one of the samples, dropped, excluded or unaccounted.
            None, with `unaccounted`, in a store of schema 1. `filtered`: further rows, which a condition left out.
        num_samples: samples that a reader sees.
        dropped: rows that did not become samples, by the reason of their last try.
        excluded: samples that readers leave out, by reason.
        unaccounted: input rows that are neither samples nor dropped; 0 in a valid store.
        warnings: files that the manifest does not know, such as those a killed run left.
    """

    ok: bool = False
    files_checked: int = 0
    bytes_checked: int = 0
    input_rows: int | None = None
    filtered: int = 0
    num_samples: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, int] = field(default_factory=dict)
    unaccounted: int | None = None
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
