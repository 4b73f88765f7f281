"""The pictures that requests name by their digests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from heatsink.runtime.digest import image_digest
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Pictures:
    """What comes with one request.

    Attributes:
        image: to start from.
        mask: of the same scene: bright where it is painted anew, dark where the image stays.
        controls: by the name of the ControlNet that reads it.
    """

    image: Image | None = None
    mask: Image | None = None
    controls: Mapping[str, Image] = field(default_factory=dict)


def check_pictures(
    requests: Sequence[Request], given: Sequence[Image | Pictures | None] | None
) -> list[Pictures]:
    """The pictures of each request, all of them those that its digests name.

    Args:
        requests: what to make.
        given: for each its pictures; an image alone is where it starts from.

    Raises:
        InvalidRequest: a picture is missing, is another one, or comes with a request that names
            none.
    """
    each = [None] * len(requests) if given is None else list(given)
    if len(each) != len(requests):
        raise InvalidRequest(
            f"images: expected one (or None) for each of {len(requests)} requests, got {len(each)}"
        )
    found = [one if isinstance(one, Pictures) else Pictures(one) for one in each]
    for request, own in zip(requests, found, strict=True):
        _check("image", "image_digest", own.image, request.image_digest)
        _check("mask", "mask_digest", own.mask, request.mask_digest)
        for name in sorted(request.controls.keys() | own.controls.keys()):
            wanted = request.controls.get(name)
            digest = None if wanted is None else wanted.image_digest
            _check(f"control {name!r}", "image_digest", own.controls.get(name), digest)
    return found


def _check(what: str, names: str, image: Image | None, digest: str | None) -> None:
    if image is None and digest is not None:
        raise InvalidRequest(f"{what}: expected the picture that {names} names, got none")
    if image is not None and image_digest(image) != digest:
        raise InvalidRequest(f"{what}: its pixels are not those of the request's {names}")
