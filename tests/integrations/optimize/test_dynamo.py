"""torch.compile(backend="heatsink"): what is lowered, what runs as it is, what is refused."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heatsink.integrations import dynamo
from heatsink.integrations.aot_graph import dotted

ROOT = Path(__file__).resolve().parents[3]
Made = list[dynamo.Lowered]
FUSED = ("attention", "conv2d", "linear", "group_norm_silu", "layer_norm")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Every graph that was lowered to programs, in order."""
    found: Made = []

    class Noted(dynamo.Lowered):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr(dynamo, "Lowered", Noted)
    return found


def compiled(function: Any, **options: Any) -> Callable[..., Any]:
    """Compiled without graph breaks."""
    return torch.compile(function, backend=dynamo.backend, fullgraph=True, **options)


def close(found: Tensor, wanted: Tensor) -> bool:
    """Within a float32 budget of rounding."""
    return bool(torch.allclose(found, wanted, rtol=1e-5, atol=1e-5))


class Net(nn.Module):
    """A convolution, attention, a view, a cut, a buffer and a constant of its own."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1)])
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("shift", torch.linspace(0, 1, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.blocks[0](x).flatten(2).transpose(1, 2) + self.shift
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        h = nn.functional.scaled_dot_product_attention(q, k, v)
        return h * torch.tensor([2.0]), h.transpose(1, 2)


def _net(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def test_every_batch_size_is_a_program(made: Made, seed: int) -> None:
    net = _net(seed)
    run = compiled(net)
    with torch.no_grad():
        for rows in (2, 3, 5, 3):
            x = torch.randn(rows, 4, 5, 6)
            for found, wanted in zip(run(x), net(x), strict=True):
                assert close(found, wanted)
                assert found.stride() == wanted.stride()
    # One for the first size, and one with a symbolic batch for all that came after.
    assert len(made) == 2
    assert not any(lowered.unfused for lowered in made)
    assert [len(lowered.programs) for lowered in made] == [1, 2]


def test_weights_and_paths_have_the_modules_names(made: Made, seed: int) -> None:
    with torch.no_grad():
        compiled(_net(seed))(torch.randn(2, 4, 5, 6))
    ((_, component),) = made[0].programs.values()
    names = {"blocks.0.weight", "blocks.0.bias", "qkv.weight", "qkv.bias", "shift"}
    assert names <= set(component.graph.weights)
    paths = {n.meta["heatsink_path"] for n in component.graph.nodes if n.op == "call_function"}
    assert {"blocks.0", "qkv", ""} <= paths


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['conv']._parameters['weight']", "conv.weight"),
        ("L['self'].__dict__['_modules']['down'].0.resnets.1.conv1", "down.0.resnets.1.conv1"),
        ("L['self'].proj@1", "proj"),
        ("L['model']._buffers['shift']", "shift"),
    ],
)
def test_names_without_scaffolding(source: str, name: str) -> None:
    assert dotted(source) == name


def test_weights_that_are_written_are_read_again(made: Made, seed: int) -> None:
    net = _net(seed)
    run = compiled(net)
    x = torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        run(x)
        ((_, component),) = made[0].programs.values()
        held = dict(component._constants)
        net.qkv.weight.mul_(2)
        assert close(run(x)[0], net(x)[0])
        net.shift.add_(1)
        assert close(run(x)[0], net(x)[0])
        # There and back: rounded, in other memory of the same parameter.
        net.qkv.to(torch.bfloat16).to(torch.float32)
        assert close(run(x)[0], net(x)[0])
    ((_, after),) = made[0].programs.values()
    assert after is component
    again = {name for name, value in component._constants.items() if value is not held[name]}
    # A buffer is used as it is.
    assert again == {"qkv.weight", "qkv.bias"}


def test_weights_whose_writes_no_one_counts_are_inputs(made: Made, seed: int) -> None:
    with torch.inference_mode():
        net = _net(seed)
        run = compiled(net)
        x = torch.randn(2, 4, 5, 6)
        run(x)
        net.qkv.weight.mul_(2)
        assert close(run(x)[0], net(x)[0])
    ((_, component),) = made[0].programs.values()
    assert set(component.graph.weights) == {"_tensor_constant0"}


def test_another_module_of_the_class_gets_its_own_results(seed: int) -> None:
    nets = [_net(seed), _net(seed + 1)]
    runs = [compiled(net) for net in nets]
    x = torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        for _ in range(2):
            for net, run in zip(nets, runs, strict=True):
                assert close(run(x)[0], net(x)[0])


def test_results_that_are_no_tensors_and_inputs_given_back(made: Made) -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Any, ...]:
        return x.shape[0] * 2, x * 2, None, y, x * 2

    run = compiled(function, dynamic=True)
    for rows in (3, 4):
        x, y = torch.randn(rows, 6), torch.randn(2)
        found = run(x, y)
        assert found[0] == rows * 2
        assert found[2] is None
        assert found[3] is y
        assert torch.equal(found[1], x * 2)
        assert torch.equal(found[4], x * 2)
    assert len(made) == 1
    assert not made[0].unfused


def test_inputs_that_are_written_to(made: Made) -> None:
    def function(x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 1

    x = torch.ones(4)
    assert torch.equal(compiled(function)(x), torch.full((4,), 3.0))
    assert torch.equal(x, torch.full((4,), 2.0))
    assert len(made) == 1


def test_inputs_of_other_strides(made: Made) -> None:
    def function(x: Tensor) -> Tensor:
        return (x * 2).permute(0, 2, 3, 1).reshape(len(x), -1) + 1

    x = torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last)
    assert close(compiled(function)(x), function(x))
    assert len(made) == 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: nn.functional.dropout(x, 0.5) * 0 + 1, "native_dropout.default draws random"),
        (
            lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)),
            "is control flow, no tensor",
        ),
    ],
)
def test_what_is_no_program_runs_unfused_and_says_so(
    made: Made, caplog: pytest.LogCaptureFixture, function: Any, reason: str
) -> None:
    x = torch.ones(4)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        found = compiled(function)(x)
    assert torch.isfinite(found).all()
    assert made == []
    assert "runs unfused" in caplog.text
    assert reason in caplog.text


def test_a_program_that_can_not_be_built_runs_unfused(
    made: Made, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("the size u0 depends on data")

    monkeypatch.setattr(dynamo, "convert", fail)
    x = torch.ones(4)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(compiled(lambda v: v * 2)(x), x * 2)
    assert made[0].unfused
    assert "runs unfused: the size u0 depends on data" in caplog.text


def test_gradients_are_refused(seed: int) -> None:
    x = torch.randn(2, 4, 5, 6)
    with pytest.raises(Exception, match=r"backend 'heatsink' is for inference: .*no_grad"):
        compiled(_net(seed))(x)


def test_options_are_refused() -> None:
    run = torch.compile(lambda x: x + 1, backend=dynamo.backend, options={"fast": True})
    with pytest.raises(Exception, match=r"backend 'heatsink': unknown options \['fast'\]"):
        run(torch.ones(2))


def test_autocast_is_in_the_graph(seed: int) -> None:
    net = _net(seed)
    x = torch.randn(2, 4, 5, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = compiled(net)(x)[0], net(x)[0]
    assert found.dtype == wanted.dtype
    assert torch.allclose(found, wanted, atol=0.05)


def test_the_entry_point_is_the_backend() -> None:
    from importlib.metadata import EntryPoint

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["torch_dynamo_backends"]["heatsink"]
    point = EntryPoint("heatsink", value, "torch_dynamo_backends")
    assert point.load() is dynamo.backend


def test_it_can_be_registered_by_name(made: Made) -> None:
    name = "heatsink-under-test"
    torch._dynamo.register_backend(dynamo.backend, name=name)
    run = torch.compile(lambda x: x * 2, backend=name, fullgraph=True)
    assert torch.equal(run(torch.ones(3)), torch.full((3,), 2.0))
    assert len(made) == 1


def test_diffusers_networks_without_a_graph_break(made: Made, seed: int) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(seed)
    unet: Any = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, cross_attention_dim=12,
    ).eval()  # fmt: skip
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4,
    ).eval()  # fmt: skip
    given = torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 5, 12)
    with torch.inference_mode():
        assert close(compiled(unet)(*given).sample, unet(*given).sample)
        assert close(compiled(vae.decode)(given[0]).sample, vae.decode(given[0]).sample)
    assert len(made) == 2
    assert not any(lowered.unfused for lowered in made)
    ((_, component),) = made[0].programs.values()
    # All weights of the network are in it, by the checkpoint's names.
    origins = component.graph.origins.values()
    assert {origin.parameter for parts in origins for origin in parts} >= set(unet.state_dict())
    kinds = {str(node.target) for node in component.graph.nodes}
    assert {f"heatsink.{op}.default" for op in FUSED} <= kinds
