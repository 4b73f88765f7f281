"""What follows a linear layer or a convolution goes into it, where nothing else uses its result.

A product is `heatsink::linear` or `heatsink::conv2d`: act(x W + bias + sample_add) + residual.

Rules, each where the order above allows it:
1. `linear(x) + b` with a weight b of one value a channel: b becomes the bias of a product without.
2. `product + s` with s (B, N), one row a sample, spread over the positions: s becomes `sample_add`.
   So a time embedding is added.
3. `act(product)`: silu, gelu (exact or tanh) and x * sigmoid(1.702 x) become the activation.
4. `geglu(linear)` becomes the activation "geglu".
5. `product + r` with r of the product's own shape: r becomes the residual. Of two products that are
   added, the later takes the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from heatsink.runtime.graph.graph import WEIGHT_KEY, Graph
from heatsink.runtime.graph.passes.edit import (
    argument,
    erase_unused,
    only_user,
    operator,
    same_sizes,
    traced,
)
from heatsink.runtime.graph.passes.trace import propagate, replace

_PRODUCTS = {"heatsink.linear", "heatsink.conv2d"}
_QUICK = 1.702


def fuse_epilogues(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    modified = False
    for node in list(graph.nodes):
        product: fx.Node | None = node if operator(node) in _PRODUCTS else None
        while product is not None:
            product = next((n for rule in _RULES if (n := rule(product)) is not None), None)
            modified |= product is not None
    if modified:
        propagate(graph)
    return graph, modified


def _absorb(product: fx.Node, user: fx.Node, **changes: Any) -> fx.Node:
    """Put `product` with other arguments in the place of `user`."""
    target: Any = product.target
    names = [declared.name for declared in target._schema.arguments]
    args = [changes.get(name, argument(product, name)) for name in names]
    sources = user.all_input_nodes
    fused = replace(user, target, args, product)
    for source in (product, *sources):
        erase_unused(source)
    return fused


def _free(product: fx.Node, *names: str) -> bool:
    """Whether none of these steps of the epilogue is taken."""
    return all(not argument(product, name) for name in names)


def _added(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The addition that alone uses a product, and what is added."""
    user = only_user(product)
    if user is None or operator(user) != "aten.add" or argument(user, "alpha") != 1:
        return None
    left, right = user.args[:2]
    other = right if left is product else left
    mine, its, both = traced(product), traced(other), traced(user)
    if mine is None or its is None or both is None or other is product:
        return None
    same = mine.dtype == its.dtype == both.dtype and same_sizes(mine.shape, both.shape)
    return (user, other) if same and isinstance(other, fx.Node) else None


def _bias(product: fx.Node) -> fx.Node | None:
    added = _added(product)
    if added is None or operator(product) != "heatsink.linear":
        return None
    user, other = added
    value, mine = traced(other), traced(product)
    assert value is not None
    assert mine is not None
    if WEIGHT_KEY not in other.meta or value.dim() != 1 or value.shape[0] != mine.shape[-1]:
        return None
    if not _free(product, "bias", "sample_add", "activation", "residual"):
        return None
    return _absorb(product, user, bias=other)


def _sample_add(product: fx.Node) -> fx.Node | None:
    added = _added(product)
    if added is None or not _free(product, "sample_add", "activation", "residual"):
        return None
    user, other = added
    rows = other
    while operator(rows) == "aten.unsqueeze":
        rows = rows.args[0]  # type: ignore[assignment]
    value, spread, mine = traced(rows), traced(other), traced(product)
    assert spread is not None
    assert mine is not None
    if value is None or value.dim() != 2 or mine.dim() < 3:
        return None
    channel = 1 if operator(product) == "heatsink.conv2d" else mine.dim() - 1
    sizes: list[Any] = [1] * mine.dim()
    sizes[0], sizes[channel] = mine.shape[0], mine.shape[channel]
    if not same_sizes(spread.shape, sizes) or not same_sizes(
        value.shape, [sizes[0], sizes[channel]]
    ):
        return None
    return _absorb(product, user, sample_add=rows)


def _activation(product: fx.Node) -> fx.Node | None:
    if not _free(product, "activation", "residual"):
        return None
    user = only_user(product)
    if user is None:
        last = _quick_gelu(product)
        return None if last is None else _absorb(product, last, activation="quick_gelu")
    name = operator(user)
    if name == "aten.silu":
        return _absorb(product, user, activation="silu")
    if name == "aten.gelu":
        kinds = {"none": "gelu", "tanh": "gelu_tanh"}
        return _absorb(product, user, activation=kinds[argument(user, "approximate")])
    if name == "heatsink.geglu" and operator(product) == "heatsink.linear":
        return _absorb(product, user, activation="geglu")
    return None


def _quick_gelu(product: fx.Node) -> fx.Node | None:
    """The multiplication that ends product * sigmoid(1.702 product)."""
    users = list(product.users)
    if len(users) != 2 or any(operator(user) != "aten.mul" for user in users):
        return None
    scaled = next((u for u in users if _QUICK in u.args), None)
    sigmoid = None if scaled is None else only_user(scaled)
    if sigmoid is None or operator(sigmoid) != "aten.sigmoid":
        return None
    last = only_user(sigmoid)
    (other,) = (user for user in users if user is not scaled)
    return last if last is other and set(last.args) == {product, sigmoid} else None


def _residual(product: fx.Node) -> fx.Node | None:
    added = _added(product)
    if added is None or not _free(product, "residual"):
        return None
    user, other = added
    mine, its = traced(product), traced(other)
    assert mine is not None
    assert its is not None
    if not same_sizes(mine.shape, its.shape):
        return None
    # The later of two products is still to come, with the other as its residual.
    later = operator(other) in _PRODUCTS and product < other and only_user(other) is user
    if later and _free(other, "residual"):
        return None
    return _absorb(product, user, residual=other)


_RULES: tuple[Callable[[fx.Node], fx.Node | None], ...] = (
    _bias,
    _sample_add,
    _activation,
    _residual,
)
