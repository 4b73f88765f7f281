"""Every error a caller can meet, by kind. All derive from `HeatsinkError`.

`exit_code` is what the command line returns: 2 for the caller's mistakes, 1 for everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class HeatsinkError(Exception):
    """The base of this package's errors."""

    exit_code = 1


class CallerError(HeatsinkError):
    """Something the caller gave is wrong; nothing was started or written."""

    exit_code = 2


class InvalidRequest(CallerError, ValueError):
    """A request's field is out of range or contradicts another."""


class ModelError(CallerError):
    """A model folder or checkpoint is missing, incomplete, damaged or of an unknown kind."""


class UnsafeFile(ModelError):
    """A file that can run code when it is loaded (pickle); only safetensors are read."""


class AdapterError(CallerError):
    """An adapter file can't be applied whole; `refused` maps each key to its reason."""

    def __init__(self, message: str, refused: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.refused = refused or {}


class DamagedFile(AdapterError):
    """An adapter's file is empty, truncated or no safetensors."""


class UnknownAdapter(CallerError):
    """An adapter is named that is not there; `known` lists the names that are."""

    def __init__(self, message: str, known: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.known = tuple(known)


class EngineMismatch(CallerError):
    """An engine folder is of another version, damaged, or answers otherwise than once built."""


class NotBuilt(CallerError):
    """The engine was built without what is asked of it, or this version can't build it yet."""


class MissingDependency(CallerError):
    """An optional library is needed; the message says what to install."""


class MergeTimeout(HeatsinkError):
    """The gate did not open in time: requests, or a merge, were still under way."""


class WaitsForItself(CallerError, RuntimeError):
    """A merge was asked for inside a request, or a request inside a merge: it would never begin."""


class NumericError(HeatsinkError):
    """Weights or results hold NaN or infinity where they must not; names the node or tensor."""


class NonFiniteWeights(NumericError, ModelError):
    """The caller's model or adapter holds NaN or infinity, or overflows on ordinary inputs."""

    exit_code = 2


class ResourceError(HeatsinkError):
    """The machine ran out of disk, memory or device memory."""


class CaptureFailed(HeatsinkError):
    """A program can't be captured in a CUDA graph; the message names the operator."""


class CapacityError(HeatsinkError):
    """All room is taken; nothing was started, and it may work once others are done.

    `holders` says what holds each place.
    """

    def __init__(self, message: str, holders: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.holders = dict(holders or {})
