"""A model's tokenizer by its `tokenizer.json` alone, as encoders call one of transformers.

Transformers itself would cost the server 5 seconds and 200 MB.
"""

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from stages.encoders.model_files import tokenizer_digest, tokenizer_files
from stages.encoders.tiny import TINY_MODEL, tiny_tokenizer

_FILE = "tokenizer.json"


class NoTokenizerError(LookupError):
    """There is none to use on this machine; says why."""


class FileTokenizer:
    """What `RecipeReader` and `tokenize` use of a tokenizer. Safe for threads."""

    is_fast = True
    truncation_side = "right"

    def __init__(self, backend: Any, settings: Mapping[str, Any]):
        """
        Args:
            backend: of the library `tokenizers`.
            settings: of the tokenizer, as a fingerprint has them.
        """
        self.backend_tokenizer = backend
        self.name_or_path = _FILE
        special: Mapping[str, Any] = settings.get("special_tokens") or {}
        self.bos_token, self.eos_token, self.pad_token = (
            special.get(name) for name in ("bos_token", "eos_token", "pad_token")
        )
        self.pad_token_id = None if self.pad_token is None else backend.token_to_id(str(self.pad_token))
        self._lock = threading.Lock()

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int = 0,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
    ) -> dict[str, Any]:
        """Token ids of a text or of each of some, and where in the text each token is."""
        with self._lock:
            self.backend_tokenizer.no_padding()
            if truncation:
                self.backend_tokenizer.enable_truncation(max_length)
            else:
                self.backend_tokenizer.no_truncation()
            texts = [text] if isinstance(text, str) else text
            found = [self.backend_tokenizer.encode(each, add_special_tokens=add_special_tokens) for each in texts]
        ids, offsets = [each.ids for each in found], [each.offsets for each in found]
        one = isinstance(text, str)
        return {"input_ids": ids[0] if one else ids, "offset_mapping": offsets[0] if one else offsets}

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab()

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.backend_tokenizer.token_to_id(token)

    def text(self, token_id: int) -> str:
        """A token as the tokenizer writes it."""
        return self.backend_tokenizer.id_to_token(token_id) or str(token_id)


def find_tokenizer(fingerprint: Mapping[str, Any], configured: str | None) -> FileTokenizer:
    """The tokenizer that a fingerprint names, if it is on this machine.

    Args:
        configured: where the configuration of the run says that the model is.
    Raises:
        NoTokenizerError: it is not, or it is another one.
    """
    model = str(fingerprint.get("model"))
    backend, digest = _load(model, fingerprint.get("revision"), configured)
    if digest is not None and digest != fingerprint.get("tokenizer_sha256", digest):
        raise NoTokenizerError("the tokenizer on this machine is another one than that of the fingerprint")
    return FileTokenizer(backend, fingerprint.get("tokenizer") or {})


@lru_cache(maxsize=4)
def _load(model: str, revision: str | None, configured: str | None) -> tuple[Any, str | None]:
    """A tokenizer of the library `tokenizers`, and the digest of its folder."""
    from tokenizers import Tokenizer

    if TINY_MODEL in (model, configured):
        return Tokenizer.from_str(tiny_tokenizer()), None
    folders = [folder for folder in _folders(model, revision, configured) if folder.is_dir()]
    for folder in folders:
        if (folder / _FILE).is_file():
            return Tokenizer.from_file(str(folder / _FILE)), tokenizer_digest(folder)
    if any(tokenizer_files(folder) for folder in folders):
        raise NoTokenizerError(f"the tokenizer of {model} has no {_FILE} on this machine; others cannot be read here")
    raise NoTokenizerError(f"the tokenizer of {model} is not on this machine")


def _folders(model: str, revision: str | None, configured: str | None) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folders = [Path(configured)] if configured and "://" not in configured else []
    for name in filter(None, (configured, model)):
        for file in (_FILE, "config.json"):
            try:
                found = try_to_load_from_cache(name, file, revision=revision)
            except HFValidationError:
                continue  # a local folder's name
            folders += [Path(found).parent] if isinstance(found, str) else []
    return folders
