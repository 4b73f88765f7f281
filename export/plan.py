"""What decides a component's files: its shapes, options and weights, and the digest of it all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from heatsink.export import environment
from heatsink.export.backends import OnnxRuntime
from heatsink.export.manifest import Precision
from heatsink.export.onnx import DEFAULT_OPSET
from heatsink.runtime.digest import canonical_json, sha256_bytes
from heatsink.runtime.errors import InvalidRequest, ModelError
from heatsink.runtime.graph.components import TextLayer, input_shapes
from heatsink.runtime.model import Model
from heatsink.runtime.port_layout import PortLayout
from heatsink.runtime.text import Tokenizer

Report = Callable[[str, int, int], None]
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
"""Of weights, by the manifest's precision."""
# Recorded in the build key: raise it when capture, passes, export or ops change what they make.
RECIPE = 4


@dataclass(frozen=True)
class Plan:
    """All that decides a component's files and known answers."""

    name: str
    shapes: dict[str, tuple[int | str, ...]]
    text_layer: TextLayer | None
    largest: int
    opset: int | None
    precision: Precision
    backend: str
    source_digest: str
    parameters: int
    layout: PortLayout | None = None
    high: tuple[str, ...] = ()

    @property
    def disk_bytes(self) -> int:
        """Bytes its files will take, about; a graph with ports shares the weights of the other."""
        graphs = 1 if self.layout is None else 2
        return DTYPES[self.precision].itemsize * self.parameters + graphs * (1 << 20)

    def key(self, strict: bool) -> str:
        """SHA-256 of everything above, the libraries, the processor and its instruction set.

        Known answers are part of what is taken over: those of other instructions, threads or ops
        would be refused where the engine is opened, and taken over again when it is built anew.
        """
        values: dict[str, Any] = {
            **{k: v for k, v in self.__dict__.items() if k not in ("shapes", "layout")},
            "layout": self.layout.as_dict() if self.layout else None,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "strict": strict,
            "recipe": RECIPE,
            "heatsink": environment.version(),
            "libraries": environment.libraries(),
            "device": environment.processor(),
            "identity": environment.identity(),
        }
        return sha256_bytes(canonical_json(values))


def vae_factor(model: Model) -> int:
    """Pixels a latent, in each direction."""
    levels = len(model.config("vae_decoder").get("block_out_channels", [0]))
    return int(2 ** (levels - 1))


def default_size(model: Model) -> tuple[int, int]:
    """The (height, width) in pixels that the UNet was made for."""
    size = model.config("unet").get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else size
    factor = vae_factor(model)
    return height * factor, width * factor


def check_size(model: Model, size: tuple[int, int]) -> None:
    """Refuse a size that the networks' down- and upsampling can't make.

    Raises:
        InvalidRequest: names the multiple that height and width must be of.
    """
    levels = len(model.config("unet").get("block_out_channels", [0]))
    multiple = vae_factor(model) * int(2 ** (levels - 1))
    for name, value in zip(("height", "width"), size, strict=True):
        if value <= 0 or value % multiple:
            raise InvalidRequest(
                f"size: expected a {name} that is a positive multiple of {multiple} for this "
                f"model, got {value}"
            )


def plan(
    model: Model,
    name: str,
    size: tuple[int, int],
    rows: int,
    *,
    opset: int | None,
    precision: Precision,
    backend: str,
    layout: PortLayout | None = None,
    high: Sequence[str] = (),
    report: Report,
) -> Plan:
    """Work out a component's shapes and digest; reads its weights once.

    Args:
        model: the model with all adapters fused in.
        name: of the component.
        size: (height, width) in pixels.
        rows: the largest batch of the UNet.
        opset: of the ONNX file; None takes the default.
        precision: what it computes in.
        backend: who runs it.
        layout: of its adapter ports, if it gets any.
        high: modules that compute in float32 where the rest is of a lower precision.
        report: called with (what is being done, done, total).

    Raises:
        ModelError: the tokenizer gives more tokens than the text encoder takes.
    """
    config = dict(model.config(name))
    factor = vae_factor(model)
    height, width = size if name == "vae_encoder" else (size[0] // factor, size[1] // factor)
    length = _text_length(model, name)
    weights = model.weights(name)
    return Plan(
        name=name,
        shapes=input_shapes(
            name,
            config,
            height=height,
            width=width,
            text_length=length,
            controlled=name == "unet" and bool(model.controlnets),
        ),
        text_layer=_text_layer(model, name),
        # An image is one row of the VAE and up to two of the UNet.
        largest=max(1, rows // 2) if name.startswith("vae") else rows,
        opset=(opset or DEFAULT_OPSET) if backend == OnnxRuntime.name else None,
        precision=precision,
        backend=backend,
        source_digest=model.digest(
            name, lambda done, total: report(f"digesting {name}", done, total)
        ),
        parameters=sum(int(np.prod(entry.shape)) for entry in weights.entries.values()),
        layout=layout,
        high=tuple(high),
    )


def _text_length(model: Model, name: str) -> int:
    index = 1 if name == "text_encoder_2" else 0
    length = Tokenizer(model.tokenizer_folder(index)).max_length
    most = model.config(name).get("max_position_embeddings", length)
    if name.startswith("text_encoder") and length > most:
        raise ModelError(
            f"{model.tokenizer_folder(index)}: model_max_length is {length}, {name} takes {most}"
        )
    return length


def _text_layer(model: Model, name: str) -> TextLayer | None:
    if not name.startswith("text_encoder"):
        return None
    return "penultimate" if model.kind == "sdxl" else "last"
