from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import argument, operator
from heatsink.runtime.graph.passes.fold_constants import fold_constants
from heatsink.runtime.graph.passes.fuse_attention import fuse_attention
from heatsink.runtime.graph.weight import COMPUTED

HEADS, SIZE, TOKENS = 2, 8, 5
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
sdpa = functional.scaled_dot_product_attention


class Net(nn.Module):
    """`function` of q, k, v (B, H, S, D), seen from tokens (B, S, H D)."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.q, self.k, self.v = (nn.Linear(6, HEADS * SIZE) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (
            layer(x).view(x.shape[0], -1, HEADS, SIZE).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return (self.function(q, k, v).transpose(1, 2).reshape(x.shape[0], -1, HEADS * SIZE),)


def _ops(graph: Graph) -> Counter[str]:
    return Counter(operator(node) for node in graph.nodes if node.op == "call_function")


def _attention(graph: Graph) -> Any:
    (node,) = (n for n in graph.nodes if operator(n) == "heatsink.attention")
    return node


def _causal(q: Tensor) -> Tensor:
    counted = torch.arange(q.shape[2], device=q.device)
    return counted[None, :] <= counted[:, None]


def _fuse(graph: Graph) -> Graph:
    return run_passes(graph, [fold_constants, fuse_attention])


def test_rule_1_no_transposition_is_left(
    capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    graph = capture_net(Net(sdpa), TOKENS, 6)
    fused = _fuse(graph)
    assert _ops(graph)["aten.transpose"] == 4
    assert _ops(fused)["aten.transpose"] == 0
    assert argument(_attention(fused), "scale") == pytest.approx(SIZE**-0.5)
    agree(graph, fused, {"x": torch.randn(3, TOKENS, 6)})


@pytest.mark.parametrize("order", ["permute", "other heads first"])
def test_rule_1_other_ways_to_heads(
    order: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    def split(x: Tensor) -> Any:
        if order == "permute":
            return x.unflatten(-1, (HEADS, 3)).permute(0, 2, 1, 3)
        return x.view(x.shape[0], TOKENS, 3, HEADS).permute(0, 3, 1, 2)

    class Own(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (sdpa(split(x), split(2 * x), split(x + 1)),)

    torch.manual_seed(seed)
    graph = capture_net(Own(), TOKENS, 6)
    fused = _fuse(graph)
    # Heads that were made otherwise are transposed as views, and so is the result.
    views = {"permute": 1, "other heads first": 4}[order]
    assert _ops(fused)["aten.transpose"] == views
    assert _attention(fused).meta["val"].shape[1:] == (TOKENS, HEADS, 3)
    agree(graph, fused, {"x": torch.randn(2, TOKENS, 6)})


CAUSAL: dict[str, Function] = {
    "is_causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "a mask": lambda q, k, v: sdpa(q, k, v, attn_mask=_causal(q)),
    "a mask of the batch": lambda q, k, v: sdpa(
        q, k, v, attn_mask=_causal(q)[None, None].expand(q.shape[0], -1, -1, -1), scale=0.3
    ),
}


@pytest.mark.parametrize("case", CAUSAL)
def test_rule_2_causal_masks_are_recognised_by_their_values(
    case: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    graph = capture_net(Net(CAUSAL[case]), TOKENS, 6)
    fused = _fuse(graph)
    assert argument(_attention(fused), "causal") is True
    assert argument(_attention(fused), "bias") is None
    agree(graph, fused, {"x": torch.randn(3, TOKENS, 6)})


def test_rule_3_another_mask_becomes_a_computed_bias(
    capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        counted = torch.arange(TOKENS, device=q.device)
        near = (counted[None, :] - counted[:, None]).abs() < 2
        return sdpa(q, k, v, attn_mask=near)

    torch.manual_seed(seed)
    graph = capture_net(Net(windowed), TOKENS, 6)
    fused = _fuse(graph)
    bias = argument(_attention(fused), "bias")
    name = bias.meta["heatsink_weight"]
    assert [origin.transform for origin in fused.origins[name]] == [COMPUTED]
    values = fused.weights[name].load()
    near = (torch.arange(TOKENS)[None] - torch.arange(TOKENS)[:, None]).abs() < 2
    assert torch.equal(values == 0, near)
    assert torch.equal(values == -torch.inf, ~near)
    assert argument(_attention(fused), "causal") is False
    agree(graph, fused, {"x": torch.randn(3, TOKENS, 6)})


def test_rule_4_a_mask_of_numbers_is_the_bias(
    capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    graph = capture_net(Net(lambda q, k, v: sdpa(q, k, v, attn_mask=q[..., :TOKENS])), TOKENS, 6)
    fused = _fuse(graph)
    assert operator(argument(_attention(fused), "bias")) == "aten.slice"
    agree(graph, fused, {"x": torch.randn(3, TOKENS, 6)})


KEPT: dict[str, Function] = {
    "a mask that depends on an input": lambda q, k, v: sdpa(q, k, v, attn_mask=q[..., :TOKENS] > 0),
    "dropout": lambda q, k, v: sdpa(q, k, v, dropout_p=0.5),
    "a wide head": lambda q, k, v: sdpa(q.repeat(1, 1, 1, 40), k.repeat(1, 1, 1, 40), v),
    "three dimensions": lambda q, k, v: sdpa(q[:, 0], k[:, 0], v[:, 0])[:, None].expand_as(q),
    "one k for all heads": lambda q, k, v: sdpa(q, k[:, :1], v),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_the_kernel_lacks_stays(case: str, capture_net: Callable[..., Graph]) -> None:
    graph = capture_net(Net(KEPT[case]), TOKENS, 6)
    fused = _fuse(graph)
    assert _ops(fused)["aten.scaled_dot_product_attention"] == 1
    assert _ops(fused)["heatsink.attention"] == 0
