"""Tiny networks of every kind of component and their graphs, captured once a session."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.graph.capture import capture, capture_module
from heatsink.runtime.graph.components import input_shapes
from heatsink.runtime.graph.graph import PATH_KEY, WEIGHT_KEY, Graph, TensorSpec
from heatsink.runtime.graph.weight import Origin
from heatsink.runtime.port_layout import PortLayout

TOKENS = 7
VOCABULARY = 40


@dataclass
class Case:
    """A component, its network with real weights, and what it should compute."""

    component: str
    module: Any
    shapes: dict[str, tuple[int | str, ...]]
    reference: Callable[[Any, Mapping[str, Tensor]], list[Tensor]]
    text_layer: Any = None

    def capture(self, **options: Any) -> Graph:
        return capture(
            self.component,
            copy.deepcopy(self.module).to("meta"),
            options.pop("weights", self.module.state_dict()),
            example_shapes=self.shapes,
            text_layer=self.text_layer,
            **options,
        )

    def inputs(self, rows: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        given = {}
        for name, shape in self.shapes.items():
            size = [rows if s == "batch" else int(s) for s in shape]
            if name == "input_ids":
                given[name] = torch.randint(0, VOCABULARY, size, generator=draw)
            elif name == "timestep":
                given[name] = 999 * torch.rand(size, generator=draw)
            else:
                given[name] = torch.randn(size, generator=draw).to(dtype)
        return given


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    """By name: the components of SD1's kind, and those that are SDXL's own."""
    torch.manual_seed(zlib.crc32(b"tiny networks"))
    text, projecting, vae, unet, unet_xl = _text(False), _text(True), _vae(), _unet(), _unet_xl()
    tokens: dict[str, tuple[int | str, ...]] = {"input_ids": ("batch", TOKENS)}
    return {
        "text_encoder": Case("text_encoder", text, tokens, _last_hidden),
        "text_encoder of SDXL": Case("text_encoder", text, tokens, _penultimate, "penultimate"),
        "text_encoder_2": Case("text_encoder_2", projecting, tokens, _pooled),
        "vae_decoder": Case("vae_decoder", vae, _shapes("vae_decoder", vae, 4, 6), _decoded),
        "vae_encoder": Case("vae_encoder", vae, _shapes("vae_encoder", vae, 8, 12), _encoded),
        "unet": Case("unet", unet, _shapes("unet", unet, 8, 8), _unet_out),
        "unet of SDXL": Case("unet", unet_xl, _shapes("unet", unet_xl, 8, 8), _unet_out),
        **_controlled("", unet),
        **_controlled(" of SDXL", unet_xl),
    }


def _controlled(suffix: str, unet: Any) -> dict[str, Case]:
    """A ControlNet made for a UNet, and that UNet with inputs for its residuals."""
    net = _controlnet(unet)
    own = input_shapes("unet", unet.config, height=8, width=8, text_length=TOKENS, controlled=True)
    return {
        f"controlnet{suffix}": Case("controlnet", net, _shapes("controlnet", net, 8, 8), _control),
        f"unet{suffix} with residuals": Case("unet", unet, own, _unet_out),
    }


@pytest.fixture(scope="session")
def graphs(cases: dict[str, Case]) -> Callable[[str], Graph]:
    """The captured graph of a case; don't change it."""
    done: dict[str, Graph] = {}

    def graph(name: str) -> Graph:
        if name not in done:
            done[name] = cases[name].capture()
        return done[name]

    return graph


def capture_net(net: nn.Module, *shape: int, outputs: Sequence[str] = ("y",)) -> Graph:
    """The graph of a network of one float32 input `x` (batch, *shape)."""
    return capture_module(
        "net",
        copy.deepcopy(net).to("meta"),
        net.state_dict(),
        dict(net.named_buffers()),
        {"x": TensorSpec(("batch", *shape), torch.float32)},
        outputs,
    )


@pytest.fixture(name="capture_net")
def _capture_net() -> Callable[..., Graph]:
    return capture_net


@pytest.fixture
def agree() -> Callable[[Graph, Graph, Mapping[str, Tensor]], None]:
    """Asserts that two graphs compute the same, in float64 and within float32's own error."""

    def check(graph: Graph, edited: Graph, inputs: Mapping[str, Tensor]) -> None:
        exact = graph.run(inputs, dtype=torch.float64)
        wide = edited.run(inputs, dtype=torch.float64)
        plain, result = graph.run(inputs), edited.run(inputs)
        assert set(exact) == set(result)
        for output, reference in exact.items():
            largest = reference.abs().max()
            assert result[output].shape == reference.shape
            assert (wide[output] - reference).abs().max() <= 1e-12 * largest
            limit = largest * torch.finfo(torch.float32).eps
            budget = 2 * ((plain[output].double() - reference).abs().max() + limit)
            assert (result[output].double() - reference).abs().max() <= budget

    return check


def structure(graph: Graph) -> list[tuple[object, ...]]:
    """Operations, their other arguments and data flow, without a single name."""
    order = {node: index for index, node in enumerate(graph.nodes)}

    def plain(value: Any) -> Any:
        return order[value] if isinstance(value, torch.fx.Node) else value

    return [
        (
            node.op,
            str(node.target) if node.op == "call_function" else "",
            str(torch.fx.node.map_aggregate((node.args, node.kwargs), plain)),
        )
        for node in graph.nodes
    ]


@pytest.fixture(name="structure")
def _structure() -> Callable[[Graph], list[tuple[object, ...]]]:
    return structure


@pytest.fixture
def renamed() -> Callable[[Graph], Graph]:
    """Copies a fresh graph under new names for nodes, weights, parameters and modules."""
    return _renamed


def _renamed(graph: Graph) -> Graph:
    graph = graph.copy()
    paths: dict[str, str] = {}
    for index, node in enumerate(graph.nodes):
        if PATH_KEY in node.meta:
            old = node.meta[PATH_KEY]
            node.meta[PATH_KEY] = paths.setdefault(old, f"m{(len(paths) * 7919) % 10007}")
            node.meta.pop("nn_module_stack", None)
        if node.op == "call_function":
            # In an order unlike the old one.
            node._rename(f"n{(index * 7919) % 10007}")
    names = {old: f"p{(i * 7919) % 10007}.v" for i, old in enumerate(graph.weights)}
    for old, node in graph.weight_nodes().items():
        node.meta[WEIGHT_KEY] = names[old]
        node._rename(f"w{list(names).index(old)}")
    graph.weights = {names[old]: weight for old, weight in graph.weights.items()}
    graph.origins = {
        names[old]: [Origin(names[old], None, origin.transform)]
        for old, (origin,) in graph.origins.items()
    }
    graph.validate()
    return graph


def _shapes(component: str, module: Any, height: int, width: int) -> dict[str, Any]:
    return input_shapes(component, module.config, height=height, width=width, text_length=TOKENS)


def _text(projects: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=TOKENS, projection_dim=12,
        bos_token_id=1, eos_token_id=5, pad_token_id=5,
    )  # fmt: skip
    return _shake((CLIPTextModelWithProjection if projects else CLIPTextModel)(config))


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return _shake(
        AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4,
        )
    )  # fmt: skip


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    return _shake(
        UNet2DConditionModel(
            block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2, cross_attention_dim=12,
        )
    )  # fmt: skip


def _unet_xl() -> Any:
    from diffusers import UNet2DConditionModel

    return _shake(
        UNet2DConditionModel(
            block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4), cross_attention_dim=12, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 10,
        )
    )  # fmt: skip


def _controlnet(unet: Any) -> Any:
    from diffusers import ControlNetModel

    return _shake(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)))


def _shake(module: Any) -> Any:
    """Norms begin as the identity: make every parameter count."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


def _last_hidden(module: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return [module(inputs["input_ids"]).last_hidden_state]


def _penultimate(module: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return [module(inputs["input_ids"], output_hidden_states=True).hidden_states[-2]]


def _pooled(module: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    result = module(inputs["input_ids"], output_hidden_states=True)
    return [result.hidden_states[-2], result.text_embeds]


def _decoded(module: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return [module.decode(inputs["latents"] / module.config.scaling_factor).sample]


def _encoded(module: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    posterior = module.encode(inputs["image"]).latent_dist
    return [
        posterior.mean * module.config.scaling_factor,
        posterior.std * module.config.scaling_factor,
    ]


def _unet_out(module: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    given = dict(inputs)
    down = [given.pop(name) for name in inputs if name.startswith("down_residual_")]
    arguments = {
        "down_block_additional_residuals": down or None,
        "mid_block_additional_residual": given.pop("mid_residual", None),
    }
    return [module(*_first(given), added_cond_kwargs=given or None, **arguments).sample]


def _control(module: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    given = dict(inputs)
    found = []
    scales = given.pop("conditioning_scale")
    # The library has one scale a call: row by row.
    for row, scale in enumerate(scales.tolist()):
        one = {name: value[row : row + 1] for name, value in given.items()}
        first = _first(one)
        condition = one.pop("controlnet_cond")
        down, mid = module(
            *first, condition, scale, added_cond_kwargs=one or None, return_dict=False
        )
        found.append([*down, mid])
    return [torch.cat(rows) for rows in zip(*found, strict=True)]


def _first(given: dict[str, Tensor]) -> list[Tensor]:
    return [given.pop(name) for name in ("sample", "timestep", "encoder_hidden_states")]


SLOTS, RANK, ROOM = 3, 4, 4
Mix = Sequence[tuple[int, float]]


class Adapters:
    """A seeded bank of adapters for a module's linear layers and convolutions.

    Values past a row's true rank are NaN: nobody may read them.
    """

    def __init__(self, module: Any, seed: int, dtype: torch.dtype, paths: Sequence[str] = ()):
        shapes = {
            name: tuple(each.weight.shape)
            for name, each in module.named_modules()
            if isinstance(each, nn.Linear | nn.Conv2d) and (not paths or name in paths)
        }
        self.module = module
        self.layout = PortLayout.of("net", SLOTS, RANK, shapes)
        draw = torch.Generator().manual_seed(seed)
        self.bank: dict[str, Tensor] = {}
        for name, shape in self.layout.shapes().items():
            self.bank[name] = (torch.randn(shape, generator=draw) * 0.3).to(dtype)
        for name, shape in self.layout.rank_shapes().items():
            ranks = torch.randint(1, RANK + 1, shape, generator=draw, dtype=torch.int32)
            self.bank[name] = ranks
            for row, rank in enumerate(ranks.tolist()):
                for part in "ab":
                    self.bank[name.replace("ranks", part)][row, rank:] = torch.nan

    def merged(self, mix: Mix) -> Any:
        """The module in float64 with a row's adapters in its weights."""
        module = copy.deepcopy(self.module).double()
        for path, (group, port) in self.layout.places().items():
            weight: Any = module.get_submodule(path).weight
            for slot, scale in mix:
                row = port * SLOTS + slot
                rank = int(self.bank[f"bank.{group}.ranks"][row])
                a, b = (self.bank[f"bank.{group}.{name}"][row, :rank].double() for name in "ab")
                product = torch.einsum("ro,r...->o...", b, a.movedim(-1, 1))
                weight.data += float(torch.tensor(scale)) * product.reshape(weight.shape)
        return module

    @staticmethod
    def inputs(mixes: Sequence[Mix]) -> dict[str, Tensor]:
        """Slots and scales of rows; what no row uses is filled with what must not be read."""
        slots = torch.full((len(mixes), ROOM), -1)
        scales = torch.full((len(mixes), ROOM), torch.nan)
        for row, mix in enumerate(mixes):
            for place, (slot, scale) in enumerate(mix):
                slots[row, place], scales[row, place] = slot, scale
        return {"adapter_slots": slots, "adapter_scales": scales}


@pytest.fixture(scope="session")
def adapters() -> Callable[..., Adapters]:
    """Makes a bank: `adapters(module, seed, dtype, paths)`."""

    def make(
        module: Any, seed: int, dtype: torch.dtype = torch.float32, paths: Sequence[str] = ()
    ) -> Adapters:
        return Adapters(module, seed, dtype, paths)

    return make
