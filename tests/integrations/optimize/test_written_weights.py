"""Weights that are written, moved or replaced reach the programs at the next call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import heatsink
from heatsink.integrations.programs import Programs
from heatsink.integrations.watch import Watch
from heatsink.runtime.writes import note_write

Make = Callable[[], Any]
Change = Callable[[Any], Any]
PACKED = "decoder.mid_block.attentions.0.to_k"
PLAIN = "decoder.conv_in"


def decoded(vae: Any) -> Tensor:
    latents = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.as_tensor(vae.decode(latents).sample)


@pytest.fixture(scope="module")
def pipe(tiny_sd1: Path) -> Any:
    """A pipeline whose autoencoder is optimised; its tests may write its weights."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd1)
    heatsink.optimize(pipe, components=["vae"])
    decoded(pipe.vae)
    return pipe


@pytest.fixture
def vae(pipe: Any) -> Any:
    """The autoencoder of it."""
    return pipe.vae


def _scaled(module: Any) -> dict[str, Tensor]:
    return {name: value * 0.9 for name, value in module.state_dict().items()}


def _in_place(name: str) -> Change:
    def change(face: Any) -> None:
        with torch.no_grad():
            face.original.get_submodule(name).weight.mul_(-1)

    return change


def _under_inference_mode(face: Any) -> None:
    with torch.inference_mode():
        face.original.get_submodule(PACKED).weight.mul_(-1)


def _new_parameter(face: Any) -> None:
    layer = face.original.get_submodule(PACKED)
    layer.weight = nn.Parameter(layer.weight.detach() * -1)


def _new_layer(face: Any) -> None:
    layer = copy.deepcopy(face.original.get_submodule(PACKED))
    with torch.no_grad():
        layer.weight.mul_(-1)
    parent, key = PACKED.rsplit(".", 1)
    setattr(face.original.get_submodule(parent), key, layer)


def _other_data(face: Any) -> None:
    layer = face.original.get_submodule(PACKED)
    layer.weight.data = layer.weight.data * -1


def _rounded(face: Any) -> None:
    # There and back between two calls: the memory may be had again.
    face.original.to(torch.bfloat16).to(torch.float32)


def _by_address(face: Any) -> None:
    layer = face.original.get_submodule(PACKED)
    layer.weight.data.mul_(-1)
    note_write([layer.weight])


@pytest.mark.parametrize(
    "change",
    [
        _in_place(PACKED),
        _in_place(PLAIN),
        _under_inference_mode,
        _new_parameter,
        _other_data,
        _rounded,
        _by_address,
        lambda face: face.load_state_dict(_scaled(face.original)),
        lambda face: face.original.load_state_dict(_scaled(face.original)),
        lambda face: face.original.load_state_dict(_scaled(face.original), assign=True),
        lambda face: face.half().float(),
        # Rounds what the one before it left.
        lambda face: face.to(torch.bfloat16).to(torch.float32),
        _new_layer,
    ],
)
def test_what_was_changed_is_computed_with(vae: Any, change: Change) -> None:
    before, graphs = decoded(vae), vae.graphs()
    change(vae)
    found, wanted = decoded(vae), decoded(vae.original)
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(found, before, atol=1e-5)
    if change is not _new_layer:
        # Nothing was captured again.
        assert vae.graphs() == graphs


def test_only_what_was_written_is_read_again(vae: Any) -> None:
    decoded(vae)
    (component,) = vae._programs.components
    before = dict(component._constants)
    _in_place(PACKED)(vae)
    decoded(vae)
    again = {name for name, value in component._constants.items() if value is not before[name]}
    (name,) = again
    parts = {origin.parameter for origin in component.graph.origins[name]}
    prefix = PACKED.removesuffix("to_k")
    assert parts == {f"{prefix}{key}.weight" for key in ("to_q", "to_k", "to_v")}


def test_nothing_is_read_again_without_a_reason(vae: Any) -> None:
    decoded(vae)
    (component,) = vae._programs.components
    before, program = dict(component._constants), component.program(2)
    decoded(vae)
    vae.to(torch.float32)
    vae.to("cpu")
    decoded(vae)
    assert all(value is before[name] for name, value in component._constants.items())
    assert component.program(2) is program


def test_what_no_one_counts_needs_a_refresh(pipe: Any) -> None:
    before = decoded(pipe.vae)
    pipe.vae.original.get_submodule(PACKED).weight.data.mul_(-1)
    assert torch.equal(decoded(pipe.vae), before)
    assert heatsink.refresh(pipe) == ["vae"]
    found, wanted = decoded(pipe.vae), decoded(pipe.vae.original)
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(found, before, atol=1e-5)


def test_programs_in_another_precision_follow(make_sd1: Make) -> None:
    pipe = make_sd1()
    heatsink.optimize(pipe, components=["vae"], precision="bf16")
    before = decoded(pipe.vae)
    with torch.no_grad():
        pipe.vae.original.post_quant_conv.weight.mul_(-1)
    after, wanted = decoded(pipe.vae), decoded(pipe.vae.original)
    error, change = (float((image - wanted).abs().max()) for image in (after, before))
    assert error < change / 10


def test_a_buffer_that_is_written_is_captured_again() -> None:
    class Shifted(nn.Module):
        shift: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((3,), 2.0))
            self.register_buffer("shift", torch.zeros(3))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (x * self.scale + (self.shift + 1),)

    from heatsink.integrations.programs import Spaces

    module: Any = Shifted()
    programs = Programs(module, Spaces())

    def run() -> Tensor:
        assert programs.look()
        found = programs.run("shifted", lambda m: m, {"x": torch.ones(2, 3)}, ["y"], torch.float32)
        return found["y"]

    assert torch.equal(run(), torch.full((2, 3), 3.0))
    module.shift.add_(4)
    assert torch.equal(run(), torch.full((2, 3), 7.0))


def test_a_watch_names_what_changed() -> None:
    module: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    watch = Watch(module)
    assert (watch.rebuilt(), watch.changed()) == (False, set())
    with torch.no_grad():
        module[0].weight.mul_(2)
    # Tied weights have two names.
    assert watch.changed() == {"0.weight", "1.weight"}
    assert watch.changed() == set()
    module[1].bias = None
    assert watch.rebuilt()
    assert not watch.rebuilt()
    module[1].bias = nn.Parameter(torch.zeros(2))
    assert watch.rebuilt()
    module.append(nn.Linear(2, 2))
    assert watch.rebuilt()
    del module[2]
    assert watch.rebuilt()
    module[0].register_buffer("extra", torch.zeros(1))
    assert watch.rebuilt()


def test_a_write_into_an_inference_tensor_is_seen_if_it_is_told() -> None:
    with torch.inference_mode():
        module = nn.Linear(2, 2)
    watch = Watch(module)
    assert watch.changed() == set()
    note_write([module.weight])
    assert watch.changed() == {"weight"}
