"""Turns the arguments of `generate` into validated requests, one for each image."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from heatsink.runtime.digest import image_digest
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.request import Request
from heatsink.runtime.request_pictures import Pictures

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_STRENGTH = 0.8
# As in diffusers: what is painted anew begins from noise alone.
MASKED_STRENGTH = 1.0
Adapters = str | Mapping[str, float] | Sequence[str | Mapping[str, float] | None] | None
"""Adapters of a call: one choice for all prompts, or a list with one for each."""
Controls = Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None
"""`{ControlNet: picture or (picture, scale)}` for all prompts, or a list with one for each."""


def make_requests(
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None,
    image: Image | Sequence[Image | None] | None,
    strength: float | None,
    seed: int | Sequence[int],
    size: tuple[int, int] | int | None,
    adapters: Adapters = None,
    mask: Image | Sequence[Image | None] | None = None,
    control: Controls = None,
    **fields: Any,
) -> tuple[list[Request], list[Pictures]]:
    """A request for each prompt, and its pictures.

    Args:
        prompt: a text, or several.
        negative_prompt: one for all, or one for each.
        image: one for all, or one for each.
        strength: of the requests that have a picture; where not given 0.8, with a mask 1.
        seed: one number (prompt i takes seed + i), or one for each.
        size: (height, width), or one number for both.
        adapters: `{name: weight}` or a name (weight 1) for all, or a list with one of these or None
            for each.
        mask: one for all, or one for each.
        control: `{ControlNet: picture or (picture, scale)}` for all, or a list with one of these
            or None for each.
        **fields: of `Request`, the same for all.

    Raises:
        InvalidRequest: a value is out of range, of another type, or lists differ in length.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(_sequence("prompt", prompt))
    count = len(prompts)
    height, width = _pair(size)
    images, masks = (
        [_checked_image(name, each) for each in _each(name, value, count)]
        for name, value in (("image", image), ("mask", mask))
    )
    controls = [_controls(each) for each in _each("control", control, count)]
    if strength is not None and image is None:
        raise InvalidRequest(f"strength: expected an image beside it, got {strength} alone")
    seeds = _seeds(seed, count)
    mixes = [_mix(each) for each in _each("adapters", adapters, count)]
    negatives = _each("negative_prompt", negative_prompt, count)
    digest = _Digests()
    requests = [
        Request.parse(
            prompt=prompts[i],
            negative_prompt="" if negatives[i] is None else negatives[i],
            seed=seeds[i],
            height=height,
            width=width,
            strength=None if images[i] is None else _strength(strength, masks[i]),
            image_digest=digest(images[i]),
            adapters=mixes[i],
            mask_digest=digest(masks[i]),
            controls={
                name: {"image_digest": digest(picture), "scale": scale}
                for name, (picture, scale) in controls[i].items()
            },
            **fields,
        )
        for i in range(count)
    ]
    return requests, [
        Pictures(images[i], masks[i], {name: picture for name, (picture, _) in controls[i].items()})
        for i in range(count)
    ]


class _Digests:
    """Digests of pictures; of one that several prompts share it is computed once."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def __call__(self, image: Image | None) -> str | None:
        if image is None:
            return None
        if id(image) not in self._known:
            self._known[id(image)] = image_digest(image)
        return self._known[id(image)]


def _strength(strength: float | None, mask: Image | None) -> float:
    if strength is not None:
        return strength
    return DEFAULT_STRENGTH if mask is None else MASKED_STRENGTH


def _controls(control: Any) -> dict[Any, tuple[Image, Any]]:
    """What steers one prompt: pictures and scales by ControlNet."""
    if control is None:
        return {}
    if not isinstance(control, Mapping):
        raise InvalidRequest(
            "control: expected {ControlNet: picture or (picture, scale)} or None (or a list with "
            f"one of these for each prompt), got {control!r}"
        )
    found: dict[Any, tuple[Image, Any]] = {}
    for name, value in control.items():
        picture, scale = value if isinstance(value, tuple) and len(value) == 2 else (value, 1.0)
        checked = _checked_image(f"control {name!r}", picture)
        if checked is None:
            raise InvalidRequest(f"control {name!r}: expected a picture, got None")
        found[name] = checked, scale
    return found


def _mix(adapters: Any) -> dict[Any, Any]:
    """What one prompt uses, as the request holds it."""
    if adapters is None:
        return {}
    if isinstance(adapters, str):
        return {adapters: 1.0}
    if not isinstance(adapters, Mapping):
        raise InvalidRequest(
            f"adapters: expected {{name: weight}}, a name or None (or a list with one of these for "
            f"each prompt), got {adapters!r}"
        )
    return dict(adapters)


def _seeds(seed: Any, count: int) -> list[Any]:
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        return _each("seed", seed, count)
    # NumPy's and PyTorch's integers count too; True is no number.
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise InvalidRequest(f"seed: expected an integer or a list of them, got {seed!r}")
    first = operator.index(seed)
    return [first + i for i in range(count)]


def _pair(size: Any) -> tuple[Any, Any]:
    if size is None:
        return None, None
    if isinstance(size, (tuple, list)):
        if len(size) != 2:
            raise InvalidRequest(f"size: expected (height, width) or one number, got {size!r}")
        return size[0], size[1]
    return size, size


def _checked_image(name: str, image: Any) -> Image | None:
    from PIL.Image import Image

    if image is not None and not isinstance(image, Image):
        raise InvalidRequest(f"{name}: expected a PIL image, got a {type(image).__name__}")
    return image


def _sequence(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, Sequence):
        raise InvalidRequest(f"{name}: expected a text or a list of texts, got {value!r}")
    return value


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for all or a list of `count`, as a list."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != count:
            raise InvalidRequest(
                f"{name}: expected one for each of {count} prompts, got {len(value)}"
            )
        return list(value)
    return [value] * count
