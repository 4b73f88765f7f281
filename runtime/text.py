"""Prompts to token ids, as diffusers' Stable Diffusion pipelines make them, saying what was cut."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from heatsink.runtime.errors import MissingDependency, ModelError

# What the tokenizer folders of Stable Diffusion models name; loading them runs no foreign code.
_CLASSES = {
    "CLIPTokenizer": "CLIPTokenizer",
    "CLIPTokenizerFast": "CLIPTokenizer",
    "PreTrainedTokenizerFast": "PreTrainedTokenizerFast",
}
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
# transformers writes a huge number where a folder states no length.
_LONGEST = 1 << 20


class PromptTruncated(UserWarning):
    """A prompt was longer than the text encoder takes, and its end was cut."""


@dataclass(frozen=True)
class Truncation:
    """What was cut off a prompt.

    Attributes:
        prompt: The whole prompt.
        removed: The text of the tokens that were cut, as the tokenizer decodes them.
        removed_tokens: How many they are.
        max_length: The tokens that the text encoder takes, start and end included.
    """

    prompt: str
    removed: str
    removed_tokens: int
    max_length: int

    def __str__(self) -> str:
        """One sentence that quotes what was cut."""
        return (
            f"prompt cut to {self.max_length} tokens (start and end included): the last "
            f"{self.removed_tokens} are not used: {self.removed!r}"
        )


class Tokenizer:
    """A tokenizer folder of a model, loaded on first use from local files only.

    Args:
        folder: The folder (`tokenizer/` or `tokenizer_2/` of a model).
        max_length: Tokens a prompt is padded and cut to; the folder's `model_max_length` if None.

    Raises:
        ModelError: The folder does not exist, or `max_length` leaves no room for a token.
    """

    def __init__(self, folder: str | Path, max_length: int | None = None) -> None:
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise ModelError(f"tokenizer: expected a folder, got {self._folder}")
        if max_length is not None and max_length < 2:
            raise ModelError(f"max_length: expected at least 2 tokens, got {max_length}")
        self._max_length = max_length
        self._loaded: Any = None
        # Padding and truncation are state of the tokenizer while it encodes.
        self._lock = threading.Lock()

    @property
    def max_length(self) -> int:
        """Tokens of every encoded prompt, start and end included."""
        with self._lock:
            return self._length(self._tokenizer())

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[npt.NDArray[np.int64], list[Truncation | None]]:
        """Encode prompts, each padded or cut to `max_length`; warns `PromptTruncated` of every cut.

        Args:
            prompts: The texts; an empty one is encoded as start, end and padding.

        Returns:
            The ids `(B, T)` int64, and for each prompt what was cut off it or None.

        Raises:
            ModelError: The folder holds no tokenizer that can be loaded.
            MissingDependency: transformers is not installed.
        """
        with self._lock:
            tokenizer = self._tokenizer()
            length = self._length(tokenizer)
            rows = [self._encode_one(tokenizer, prompt, length) for prompt in prompts]
        for _, cut in rows:
            if cut is not None:
                warnings.warn(str(cut), PromptTruncated, stacklevel=2)
        ids = np.array([row for row, _ in rows], dtype=np.int64).reshape(len(rows), length)
        return ids, [cut for _, cut in rows]

    @staticmethod
    def _encode_one(
        tokenizer: Any, prompt: str, length: int
    ) -> tuple[list[int], Truncation | None]:
        ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
        whole = tokenizer(prompt, verbose=False).input_ids
        if len(whole) <= length:
            return ids, None
        # The last kept token is the end mark, so the cut begins one before the length.
        removed = whole[length - 1 : -1]
        return ids, Truncation(prompt, tokenizer.decode(removed), len(removed), length)

    def _length(self, tokenizer: Any) -> int:
        length = self._max_length or int(min(tokenizer.model_max_length, _LONGEST))
        if length >= _LONGEST:
            raise ModelError(
                f"{self._folder}/tokenizer_config.json: model_max_length: expected the length "
                "that the text encoder takes, got none"
            )
        return length

    def _tokenizer(self) -> Any:
        if self._loaded is None:
            self._loaded = _load(self._folder)
        return self._loaded


def _load(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency("a prompt needs transformers: pip install transformers") from error
    # transformers makes an empty tokenizer of an empty folder without a word.
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        raise ModelError(f"{folder}: expected tokenizer.json, or vocab.json and merges.txt")
    try:
        config_file = folder / "tokenizer_config.json"
        config = json.loads(config_file.read_text("utf-8")) if config_file.exists() else {}
        name = str(config.get("tokenizer_class") or "CLIPTokenizer")
        if name not in _CLASSES:
            raise ModelError(
                f"{config_file}: tokenizer_class: expected one of {', '.join(_CLASSES)}, got {name}"
            )
        kind = getattr(transformers, _CLASSES[name])
        return kind.from_pretrained(str(folder), local_files_only=True)
    except ModelError:
        raise
    # What a damaged vocabulary raises depends on transformers and on the Rust library under it.
    except Exception as error:
        raise ModelError(f"{folder}: can't load the tokenizer: {error}") from error
