"""What came of reading an adapter's file: every key applied, refused or ignored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AdapterReceipt:
    """A reader's account of one file.

    Attributes:
        path: of the file.
        sha256: of its bytes.
        format: `"diffusers"`, `"peft"` or `"kohya"`; several are joined by `+`.
        digest: of its values (`digest_deltas`); None where the file is refused, or no model was
            given.
        dtypes: of its tensors (without alphas), sorted.
        ranks: of its modules, sorted.
        applied: key -> (component, module path, role) of the keys that can be applied. Where
            anything is refused, they are not applied either.
        refused: key -> reason; a reason starts with its kind and a colon.
        ignored: keys the caller let go.
        notes: what the user should know, each a sentence.
    """

    path: str
    sha256: str
    format: str
    digest: str | None
    dtypes: tuple[str, ...]
    ranks: tuple[int, ...]
    applied: dict[str, tuple[str, str, str]]
    refused: dict[str, str]
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether the file is applied."""
        return not self.refused

    @property
    def keys(self) -> int:
        """How many keys the file holds."""
        return len(self.applied) + len(self.refused) + len(self.ignored)

    def refusal(self, most: int = 5) -> str:
        """One sentence that says why the file is refused."""
        told = "; ".join(f"{key}: {why}" for key, why in list(self.refused.items())[:most])
        return (
            f"{self.path}: {len(self.refused)} of {self.keys} keys can't be applied, so none is:"
            f" {told}"
        )

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "path": self.path,
            "sha256": self.sha256,
            "format": self.format,
            "accepted": self.accepted,
            "digest": self.digest,
            "dtypes": list(self.dtypes),
            "ranks": list(self.ranks),
            "applied": {key: list(place) for key, place in self.applied.items()},
            "refused": dict(self.refused),
            "ignored": list(self.ignored),
            "notes": list(self.notes),
        }
