"""The versioned description of an engine folder: `manifest.json`.

Every later capability fills a section that is already here; fields are added, never renamed. A
reader refuses a manifest of another `schema_version` (the number changes only where an old engine
can no longer be run).
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from heatsink.runtime.digest import canonical_json, sha256_bytes
from heatsink.runtime.errors import EngineMismatch

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Backend = Literal["torch", "onnxruntime", "tensorrt", "tensorrt-rtx"]
Precision = Literal["fp32", "bf16", "fp16", "fp8"]


def _inside(value: str) -> str:
    path = PurePosixPath(value)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in value:
        raise ValueError(f"expected a path inside the engine folder, got {value!r}")
    return value


Inside = Annotated[str, AfterValidator(_inside)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    # Fields that came later: left out where they have nothing to say, so that the digest of an
    # engine without them is what it was.
    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _leave_out_later(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if value or name not in self.later}


class Artefact(_Section):
    """A file of the engine folder."""

    path: Inside
    sha256: Sha256
    bytes: int = Field(ge=0)


class TensorSpec(_Section):
    """A named input or output; a string in `shape` is a symbolic dimension."""

    name: str
    dtype: str
    shape: list[int | str]


class Range(_Section):
    """Smallest, best served and largest value of a dimension."""

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1)


class Source(_Section):
    """The model that the engine was built from."""

    name: str
    kind: str
    digests: dict[str, Sha256]
    scheduler: dict[str, Any]
    text_encoders: list[str]
    tokenizers: list[str]
    added_conditions: list[str] = []
    latent_channels: int
    vae_factor: int
    default_size: tuple[int, int]
    force_zeros_for_empty_prompt: bool = False


class Parity(_Section):
    """The component's error against PyTorch in float64 on one probe batch, and what was allowed."""

    max_abs: float
    reference_max_abs: float
    relative: float
    allowed: float


class Component(_Section):
    """One network: its files, its interface, and where each of its initialisers came from.

    `origins` is the JSON file `{initialiser: [[parameter, slice, transform], ...]}`, of interleaved
    rows with a fourth value, [row, step]; `build_key` digests all that decided the files, so that
    an equal component need not be built again. `high` are the modules (or `module:operator`) that
    compute in float32 where the rest is of a lower precision.
    """

    later: ClassVar[frozenset[str]] = frozenset({"high"})

    artefacts: list[Artefact]
    graph: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    precision: Precision
    high: list[str] = []
    opset: int | None = None
    parameters: int
    origins: str
    source_digest: Sha256
    build_key: Sha256
    parity: Parity

    @model_validator(mode="after")
    def _files_are_listed(self) -> Self:
        listed = {artefact.path for artefact in self.artefacts}
        for name in (self.graph, self.origins):
            if name not in listed:
                raise ValueError(f"{name!r} is not among the artefacts {sorted(listed)}")
        return self


class Shapes(_Section):
    """What the engine was built for: rows of a UNet batch, height and width in pixels."""

    batch: Range
    height: Range
    width: Range


class FusedAdapter(_Section):
    """An adapter merged into the weights at build time."""

    name: str
    sha256: Sha256
    scale: float
    keys: int


class KnownAnswer(_Section):
    """Which batch sizes give a row the same bits, and the fingerprints of a seeded probe's rows.

    `buckets` are the batch sizes that the engine may run, ascending; `answers[r]` is the 64-bit
    fingerprint (hex) of row `r` of the probe, whichever of the buckets ran it (none in fast mode).
    `refused` are those that answered otherwise.
    """

    buckets: list[int] = Field(min_length=1)
    refused: list[int] = []
    probe_seed: int = Field(ge=0)
    answers: list[Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]]

    @model_validator(mode="after")
    def _answers_cover_buckets(self) -> Self:
        if self.buckets != sorted(set(self.buckets)) or self.buckets[0] < 1:
            raise ValueError(f"buckets: expected ascending positive numbers, got {self.buckets}")
        if self.answers and len(self.answers) != self.buckets[-1]:
            raise ValueError(
                f"answers: expected one for each of {self.buckets[-1]} rows, "
                f"got {len(self.answers)}"
            )
        return self


class PortedGraph(_Section):
    """A component's graph with adapter ports, beside the one without, whose weights it shares.

    `counts` are the numbers of adapters that a row's inputs may have room for (a row with fewer
    has -1 in the rest); `refused_counts` are those that gave a row other bits. `known` is of a
    probe whose rows have adapters of a seeded bank. Where `twin` is false, rows without adapters
    get other bits in the graph without ports, so that it is never run.
    """

    graph: str
    inputs: list[TensorSpec]
    counts: list[int] = Field(min_length=1)
    refused_counts: list[int] = []
    twin: bool
    parity: Parity
    known: KnownAnswer


class Ports(_Section):
    """Inputs for what a request brings along; zero slots: none were built.

    `which` layers have adapter ports: all, linear, attention. `table` is the file of the bank's
    layouts and of the names of modules that adapter files are read with.
    """

    later: ClassVar[frozenset[str]] = frozenset({"which", "table", "components"})

    adapter_slots: int = 0
    adapter_rank: int = 0
    controlnet: bool = False
    which: str = ""
    table: str = ""
    components: dict[str, PortedGraph] = {}


class Exactness(_Section):
    """Strict engines run a component only in the batch sizes that agree bit by bit."""

    mode: Literal["strict", "fast"]
    components: dict[str, KnownAnswer]

    @model_validator(mode="after")
    def _strict_has_answers(self) -> Self:
        missing = [name for name, known in self.components.items() if not known.answers]
        if self.mode == "strict" and missing:
            raise ValueError(f"a strict engine needs known answers, {missing} have none")
        return self


class Preflight(_Section):
    """Predicted and measured cost of building a component."""

    host_bytes_predicted: int | None = None
    host_bytes_measured: int | None = None
    disk_bytes_predicted: int | None = None
    disk_bytes_measured: int | None = None
    seconds_predicted: float | None = None
    seconds_measured: float | None = None


class Manifest(_Section):
    """Everything a runtime must know of an engine folder before it opens a single artefact.

    `identity` is what else may change bits: instruction set, threads, C++ or PyTorch ops.
    """

    later: ClassVar[frozenset[str]] = frozenset({"identity"})

    schema_version: int = SCHEMA_VERSION
    heatsink_version: str
    backend: Backend
    libraries: dict[str, str]
    device: str
    identity: dict[str, str] = {}
    source: Source
    shapes: Shapes
    components: dict[str, Component]
    files: list[Artefact] = []
    precisions: dict[str, Precision]
    ports: Ports = Ports()
    adapters: list[FusedAdapter] = []
    exactness: Exactness
    preflight: dict[str, Preflight] = {}

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        names = set(self.components)
        for section, found in (
            ("exactness", set(self.exactness.components)),
            ("precisions", set(self.precisions)),
        ):
            if found != names:
                raise ValueError(f"{section}: expected {sorted(names)}, got {sorted(found)}")
        for name, ported in self.ports.components.items():
            own = self.components[name].artefacts if name in names else []
            if ported.graph not in {artefact.path for artefact in own}:
                raise ValueError(f"ports: {ported.graph!r} is no artefact of {name}")
            if self.exactness.mode == "strict" and not ported.known.answers:
                raise ValueError(f"ports: a strict engine needs known answers, {name} has none")
        if self.ports.components and self.ports.table not in {a.path for a in self.files}:
            raise ValueError(f"ports: {self.ports.table!r} is not among the files")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: what a receipt names as the engine."""
        return sha256_bytes(canonical_json(self.model_dump(mode="json")))

    def artefacts(self) -> list[Artefact]:
        """All files that the manifest vouches for."""
        return [*self.files, *(a for c in self.components.values() for a in c.artefacts)]

    def write(self, folder: Path) -> None:
        """Write `folder/manifest.json`, with the digest of the rest beside it."""
        fields = {**self.model_dump(mode="json"), "digest": self.digest}
        text = json.dumps(fields, indent=2, sort_keys=True)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises:
        EngineMismatch: there is none, it is not JSON, of another schema version, does not fit the
            schema, or is not what its digest says.
    """
    path = folder / FILE_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        what = f"holds no {FILE_NAME}" if folder.is_dir() else "is not a folder"
        raise EngineMismatch(f"{folder} is not an engine folder: it {what}") from None
    # ValueError: not UTF-8, or not JSON.
    except (OSError, ValueError, RecursionError) as error:
        raise EngineMismatch(f"{path} is damaged or can't be read: {error}") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise EngineMismatch(
            f"{path} has schema version {version!r}, this Heatsink reads {SCHEMA_VERSION}; "
            "build the engine again with `heatsink build MODEL -o ENGINE`"
        )
    digest = raw.pop("digest", None)
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:4]]
        raise EngineMismatch(
            f"{path} does not fit the manifest's schema: {'; '.join(faults)}"
        ) from None
    if digest != manifest.digest:
        raise EngineMismatch(
            f"{path} is damaged: its contents have the digest {manifest.digest}, it says {digest}; "
            "build the engine again with `heatsink build MODEL -o ENGINE`"
        )
    return manifest
