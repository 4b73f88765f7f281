"""What comes back from a generation."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatsink.runtime.adapter_mix import AdapterUse
from heatsink.runtime.errors import CallerError
from heatsink.runtime.files import make_folder, write_whole
from heatsink.runtime.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Receipt:
    """What came of one request.

    Attributes:
        request: digest of the request, its adapters by content instead of by name.
        engine: digest of the engine's manifest.
        image: SHA-256 of the image's decoded pixels.
        steps: denoising steps that were executed.
        rows: rows of the UNet batch that the request held at every step.
        notes: what the caller should know, such as the part of a prompt that was cut.
        adapters: what was applied: names, digests of their contents, weights.
    """

    request: str
    engine: str
    image: str
    steps: int
    rows: int
    notes: tuple[str, ...] = ()
    adapters: tuple[AdapterUse, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The receipt as plain JSON values."""
        adapters = [use.as_dict() for use in self.adapters]
        return {**self.__dict__, "notes": list(self.notes), "adapters": adapters}


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

    def save(
        self, folder: str | Path, stem: str = "image", *, overwrite: bool = False
    ) -> list[Path]:
        """Write `folder/stem-SEED.png` for every image (a number is added where seeds repeat).

        Args:
            folder: where they go; made where it is missing.
            stem: what their names begin with.
            overwrite: replace pictures that are there already.

        Raises:
            CallerError: the folder may not be written, is a file, or holds one of the pictures
                already; none is written then.
            ResourceError: no space is left; no picture is there by halves.
        """
        paths = picture_paths(Path(folder), self.requests, stem, overwrite=overwrite)
        make_folder(Path(folder))
        for image, path in zip(self.images, paths, strict=True):
            write_whole(path, functools.partial(image.save, format="PNG"))
        return paths


def picture_paths(
    folder: Path, requests: Sequence[Request], stem: str = "image", *, overwrite: bool = False
) -> list[Path]:
    """Where the pictures of these requests go, so that a caller can ask before the work.

    Raises:
        CallerError: one of them is there already, and is not to be replaced.
    """
    paths: list[Path] = []
    for request in requests:
        path = folder / f"{stem}-{request.seed}.png"
        count = 2
        while path in paths:
            path = folder / f"{stem}-{request.seed}-{count}.png"
            count += 1
        paths.append(path)
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise CallerError(
            f"{there[0]}{more} would be replaced: name another folder or seed, or allow it "
            "(--overwrite; overwrite=True)"
        )
    return paths
