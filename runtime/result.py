"""What comes back from a generation."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatsink.runtime.files import make_folder, write_whole
from heatsink.runtime.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Receipt:
    """What came of one request.

    Attributes:
        request: digest of the request.
        engine: digest of the engine's manifest.
        image: SHA-256 of the image's decoded pixels.
        steps: denoising steps that were executed.
        rows: rows of the UNet batch that the request held at every step.
        notes: what the caller should know, such as the part of a prompt that was cut.
    """

    request: str
    engine: str
    image: str
    steps: int
    rows: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The receipt as plain JSON values."""
        return {**self.__dict__, "notes": list(self.notes)}


@dataclass(frozen=True)
class Result:
    """The images of a call, in the order of its prompts, with the requests that they answer."""

    images: list[Image]
    requests: list[Request]
    receipts: list[Receipt]
    seconds: dict[str, float] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Image]:
        return iter(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def save(self, folder: str | Path, stem: str = "image") -> list[Path]:
        """Write `folder/stem-SEED.png` for every image (a number is added where seeds repeat).

        Raises:
            CallerError: the folder may not be written, or is a file.
            ResourceError: no space is left; no picture is there by halves.
        """
        folder = Path(folder)
        make_folder(folder)
        paths: list[Path] = []
        for image, request in zip(self.images, self.requests, strict=True):
            path = folder / f"{stem}-{request.seed}.png"
            count = 2
            while path in paths:
                path = folder / f"{stem}-{request.seed}-{count}.png"
                count += 1
            write_whole(path, functools.partial(image.save, format="PNG"))
            paths.append(path)
        return paths
