"""A request: everything that decides an image's pixels besides the engine, validated and digested.

Who asks, how urgently and at whose cost (tenant, tier, deadline, idempotency key) is no part of it:
that belongs to an envelope around the request, so that equal requests of different callers are
equal here. The fields and the digest are specified in docs/request.md.
"""

from __future__ import annotations

import operator
import unicodedata
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from heatsink.runtime.digest import canonical_json, sha256_bytes
from heatsink.runtime.errors import InvalidRequest

MAX_CONTROLS = 4
"""ControlNets that steer one image."""
_SHOWN_CHARACTERS = 80
# Fields that came later: they enter the digest only where they say something.
_LATER = ("mask_digest", "controls")


class Scheduler(StrEnum):
    """The samplers, by their canonical names."""

    EULER = "euler"
    DPMPP_2M = "dpm++2m"
    DDIM = "ddim"
    LCM = "lcm"

    @classmethod
    def from_name(cls, name: object) -> Scheduler:
        """The sampler called `name`, in any case, with spaces, hyphens and underscores ignored.

        Raises:
            ValueError: There is none of that name.
        """
        if isinstance(name, str):
            folded = "".join(c for c in name.lower() if c not in " -_()").replace("++", "pp")
            for alias in (folded, folded.removesuffix("scheduler")):
                if alias in _ALIASES:
                    return _ALIASES[alias]
        known = ", ".join(member.value for member in cls)
        raise ValueError(f"expected one of {known}, got {_shown(name)}")


_ALIASES = {
    "euler": Scheduler.EULER,
    "eulerdiscrete": Scheduler.EULER,
    "dpmpp2m": Scheduler.DPMPP_2M,
    "dpmsolverpp2m": Scheduler.DPMPP_2M,
    "dpmsolverpp": Scheduler.DPMPP_2M,
    "dpmsolvermultistep": Scheduler.DPMPP_2M,
    "ddim": Scheduler.DDIM,
    "lcm": Scheduler.LCM,
}


def _shown(value: object) -> str:
    text = repr(value)
    cut = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
    return f"{cut} ({type(value).__name__})"


def _integer(value: object) -> object:
    # Integers of NumPy and PyTorch are welcome; floats, strings and booleans are mistakes.
    if isinstance(value, (bool, str, float)) or not hasattr(value, "__index__"):
        return value
    return operator.index(value)


def _text(value: str) -> str:
    # NFC, so that canonically equal prompts give equal tokens and equal digests.
    value.encode("utf-8")
    return unicodedata.normalize("NFC", value)


def _weights(value: dict[str, float]) -> dict[str, float]:
    spelled = {_text(name): weight + 0.0 for name, weight in sorted(value.items())}
    if len(spelled) != len(value):
        raise ValueError("two names are the same text")
    return spelled


def _sorted(value: dict[str, Control]) -> dict[str, Control]:
    return dict(sorted(value.items()))


Text = Annotated[str, AfterValidator(_text)]
Integer = Annotated[int, BeforeValidator(_integer)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Weight = Annotated[float, Field(allow_inf_nan=False)]
AdapterName = Annotated[str, Field(min_length=1)]


class Control(BaseModel):
    """The picture that steers an image through one ControlNet."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image_digest: Sha256
    scale: Weight = 1.0


class Request(BaseModel):
    """One image to make. Frozen; build it with `Request.parse`, which raises `InvalidRequest`.

    A field's description says what is expected of it; error messages quote it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = Field(1, description="the schema version 1")
    prompt: Text = Field(description="a text of valid Unicode")
    negative_prompt: Text = Field("", description="a text of valid Unicode")
    seed: Integer = Field(ge=0, lt=2**64, description="an integer from 0 to 2^64 - 1")
    steps: Integer = Field(20, ge=1, le=1000, description="an integer from 1 to 1000")
    scheduler: Annotated[Scheduler, BeforeValidator(Scheduler.from_name)] = Field(
        Scheduler.DPMPP_2M, description="one of " + ", ".join(Scheduler)
    )
    guidance: float = Field(
        5.0, ge=0.0, allow_inf_nan=False, description="a finite number of at least 0"
    )
    height: Integer | None = Field(
        None, gt=0, multiple_of=8, description="a positive multiple of 8 or none"
    )
    width: Integer | None = Field(
        None, gt=0, multiple_of=8, description="a positive multiple of 8 or none"
    )
    strength: float | None = Field(
        None, gt=0.0, le=1.0, description="a number above 0 and up to 1, or none"
    )
    image_digest: Sha256 | None = Field(
        None, description="a SHA-256 as 64 lower-case hexadecimal digits, or none"
    )
    adapters: Annotated[dict[AdapterName, Weight], AfterValidator(_weights)] = Field(
        default_factory=dict, description="adapter names, each with a finite weight"
    )

    mask_digest: Sha256 | None = Field(
        None, description="a SHA-256 as 64 lower-case hexadecimal digits, or none"
    )
    controls: Annotated[dict[AdapterName, Control], AfterValidator(_sorted)] = Field(
        default_factory=dict,
        max_length=MAX_CONTROLS,
        strict=False,
        description=f"up to {MAX_CONTROLS} ControlNets' names, each with a picture's digest and a "
        "finite scale",
    )

    @model_validator(mode="after")
    def _image_and_strength(self) -> Request:
        if self.strength is not None and self.image_digest is None:
            raise ValueError(f"strength: expected an image beside it, got {self.strength} alone")
        if self.image_digest is not None and self.strength is None:
            raise ValueError(
                "strength: expected a number above 0 and up to 1 with an image, got none"
            )
        if self.mask_digest is not None and self.image_digest is None:
            raise ValueError("mask: expected an image beside it, got a mask alone")
        return self

    @classmethod
    def parse(cls, **fields: Any) -> Request:
        """Validate `fields` into a request.

        Args:
            **fields: The fields by name; aliases of schedulers are welcome, unknown names are not.

        Returns:
            The request, with its texts in NFC and its scheduler canonical.

        Raises:
            InvalidRequest: Names every wrong field, what was expected and what came.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise InvalidRequest(cls._explain(error)) from None

    @classmethod
    def _explain(cls, error: ValidationError) -> str:
        problems: dict[str, str] = {}
        for item in error.errors(include_url=False):
            path = [str(part) for part in item["loc"] if part != "[key]"]
            name = path[0] if path else ""
            field = cls.model_fields.get(name)
            if not name:
                text = str(item["msg"]).removeprefix("Value error, ")
            elif field is None:
                text = f"{name}: no such field; expected one of {', '.join(cls.model_fields)}"
            elif item["type"] == "missing":
                text = f"{'.'.join(path)}: expected {field.description}, got nothing"
            else:
                text = (
                    f"{'.'.join(path)}: expected {field.description}, got {_shown(item['input'])}"
                )
            problems.setdefault(name, text)
        return "invalid request: " + "; ".join(problems.values())

    def replace(self, **changes: Any) -> Request:
        """A copy with some fields changed, validated as a whole.

        Raises:
            InvalidRequest: As `parse`.
        """
        return type(self).parse(**{**self.model_dump(), **changes})

    def resolved(self, height: int, width: int) -> Request:
        """A copy whose missing height or width is the engine's; given ones stay.

        Raises:
            InvalidRequest: `height` or `width` is not a positive multiple of 8.
        """
        return self.replace(
            height=height if self.height is None else self.height,
            width=width if self.width is None else self.width,
        )

    @property
    def rows(self) -> int:
        """Rows of a UNet batch: 2 when guided (guidance above 1), otherwise 1, the prompt's own."""
        return 2 if self.guidance > 1.0 else 1

    @property
    def digest(self) -> str:
        """The SHA-256 of what decides the pixels; equal digests mean equal images of one engine.

        Over `canonical_json` of all fields, `version` included. Without guidance the negative
        prompt is not used, so it counts as empty and guidance as 1. A field that a later version
        adds enters only when it differs from its default, so that digests stay.
        """
        fields = self.model_dump(mode="json")
        if self.rows == 1:
            fields.update(negative_prompt="", guidance=1.0)
        for name in _LATER:
            if not fields[name]:
                del fields[name]
        return sha256_bytes(canonical_json({"request": fields}))

    def __hash__(self) -> int:
        """By digest, since a dict of adapters has no hash of its own."""
        return hash(self.digest)
