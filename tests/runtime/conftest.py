"""Engines with adapter ports whose components are stand-ins: the routing is real, the rest small.

A port computes `y + sum scale B (A x)` from the bank's tensors, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_file import Targets
from heatsink.runtime.adapter_loads import Loader
from heatsink.runtime.adapters import AdapterBank
from heatsink.runtime.backends.session import Array
from heatsink.runtime.components import text_prefix
from heatsink.runtime.engine import Engine
from heatsink.runtime.port_layout import PortLayout
from heatsink.runtime.schedule import ScheduleConfig
from heatsink.runtime.spec import EngineSpec
from heatsink.runtime.text import Tokenizer

SLOTS, RANK, WIDTH = 4, 4, 6
TEXT = text_prefix("text_encoder") + "encoder.layers.0.mlp.fc1"
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "unet": {"mid.to_q": (4, 4), "mid.to_k": (4, 4), "up.conv": (4, 4, 3, 3)},
    "text_encoder": {TEXT: (WIDTH, WIDTH)},
}
CONFIG = ScheduleConfig.from_diffusers(
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
)


class Part:
    """A component with ports: a row's base, then each adapter's product, row by row."""

    def __init__(self, name: str, bank: AdapterBank | None) -> None:
        self.name, self.calls = name, list[dict[str, Array]]()
        self.layout = bank.layouts.get(name) if bank else None
        # As a session binds them: once, for good.
        self.tensors = (
            {k: t.numpy() for k, t in bank.tensors(name).items()} if bank and self.layout else {}
        )

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.calls.append({name: value.copy() for name, value in inputs.items()})
        rows = dict(inputs)
        slots, scales = rows.pop("adapter_slots", None), rows.pop("adapter_scales", None)
        if slots is not None:
            assert self.layout is not None
            assert scales is not None
            assert slots.dtype == np.int64
            assert scales.dtype == np.float32
            assert slots.shape == scales.shape
            # Without an adapter in any row the engine leaves them out.
            assert (slots >= 0).any(axis=0).all()
        found = []
        for row in range(len(next(iter(rows.values())))):
            x, y = getattr(self, self.name)({name: value[row] for name, value in rows.items()})
            if slots is not None:
                assert scales is not None
                for slot, scale in zip(slots[row], scales[row], strict=True):
                    if slot >= 0:
                        y = y + np.float32(scale) * self.ported(x, int(slot))
            found.append(y.astype(np.float32))
        return {"hidden" if self.name == "text_encoder" else "out": np.stack(found)}

    def text_encoder(self, row: Mapping[str, Array]) -> tuple[Array, Array]:
        ids = row["input_ids"].astype(np.float32)
        x = np.sin(ids[:, None] * np.arange(1, WIDTH + 1, dtype=np.float32))
        return x, x

    def unet(self, row: Mapping[str, Array]) -> tuple[Array, Array]:
        x = row["sample"]
        mean = row["encoder_hidden_states"].mean(dtype=np.float32)
        return x, np.tanh(x) * np.float32(0.7) + mean / (row["timestep"] / 100 + np.float32(1))

    def ported(self, x: Array, slot: int) -> Array:
        """The sum over all ports: on channels of the UNet's rows, on features of the text's."""
        assert self.layout is not None
        total = np.zeros_like(x)
        for path, (group, port) in sorted(self.layout.places().items()):
            row = port * self.layout.slots + slot
            a, b = (torch.from_numpy(self.tensors[f"bank.{group}.{side}"][row]) for side in "ab")
            value = torch.from_numpy(x)
            if a.dim() == 4:
                kernel = a.movedim(-1, 1)
                value = torch.conv2d(torch.conv2d(value, kernel, padding=1), b.t()[..., None, None])
            elif self.name == "unet":
                value = torch.einsum("ro,ri,ihw->ohw", b, a, value)
            else:
                value = value @ a.t() @ b
            total = total + value.numpy() * np.float32(len(path))
        return total


def decode(inputs: Mapping[str, Array]) -> dict[str, Array]:
    pixels = np.tanh(inputs["latents"][:, :3] / 4).astype(np.float32)
    return {"image": pixels.repeat(8, axis=2).repeat(8, axis=3)}


STYLES = ("noto", "twemoji", "ink", "clay")
TOUCHES = {
    "noto": [("unet", "mid.to_q"), ("text_encoder", TEXT)],
    "twemoji": [("unet", "mid.to_k"), ("unet", "up.conv")],
    "ink": [("text_encoder", TEXT)],
    "clay": [("unet", "up.conv")],
}


class Fakes:
    """Makes such engines, their banks and adapters."""

    slots, rank, shapes, styles = SLOTS, RANK, SHAPES, STYLES

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._spec = EngineSpec(
            name="fake",
            digest="e" * 64,
            text_encoders=["text_encoder"],
            tokenizers=[tokenizer],
            schedule=CONFIG,
            latent_channels=4,
            vae_factor=8,
            default_size=(64, 64),
            heights=(64, 128),
            widths=(64, 128),
        )

    def engine(self, bank: AdapterBank | None) -> Engine:
        parts = {name: Part(name, bank) for name in ("text_encoder", "unet")}
        return Engine(self._spec, {**parts, "vae_decoder": decode}, bank)

    def bank(
        self,
        *components: str,
        slots: int = SLOTS,
        loader: Loader | None = None,
        most: Mapping[str, int] | None = None,
    ) -> AdapterBank:
        layouts = [PortLayout.of(name, slots, RANK, SHAPES[name]) for name in components or SHAPES]
        flat = {
            name: {path.replace(".", "_"): path for path in table} for name, table in SHAPES.items()
        }
        return AdapterBank(layouts, targets=Targets(SHAPES, flat), loader=loader, most=most)

    def style(self, name: str, rank: int = 2) -> list[AdapterDelta]:
        """An adapter that its name decides."""
        torch.manual_seed(sum(map(ord, name)))
        deltas = []
        for component, path in TOUCHES.get(name, TOUCHES["noto"]):
            shape = SHAPES[component][path]
            a, b = torch.randn(rank, *shape[1:]) / 4, torch.randn(shape[0], rank) / 4
            deltas.append(AdapterDelta(component, path, a, b, 0.25))
        return deltas

    def calls(self, engine: Engine, component: str) -> list[dict[str, Array]]:
        """The inputs of every run of a component."""
        part = engine._components[component]
        assert isinstance(part, Part)
        return part.calls

    def images(self, engine: Engine, prompts: list[str], **fields: Any) -> list[str]:
        """The digests of the pictures."""
        given = {"steps": 3, "guidance": 4.0, "seed": [7] * len(prompts), **fields}
        return [receipt.image for receipt in engine.generate(prompts, **given).receipts]


@pytest.fixture
def fakes(tiny_sd1: Path) -> Fakes:
    """Makes engines with ports of stand-ins."""
    return Fakes(Tokenizer(tiny_sd1 / "tokenizer"))


@pytest.fixture
def styled(fakes: Fakes) -> Engine:
    """An engine with four slots that knows four styles."""
    made = fakes.engine(fakes.bank())
    for name in STYLES:
        made.add_adapter(name, fakes.style(name))
    return made
