"""What `attention` and `attention_fp8` are measured against.

PyTorch's SDPA with each of its backends, xformers, FlashAttention-3 and SageAttention, each on
the same `(B, S, H, D)` tensors through views, as a user would call it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heatsink.benchmarks.bundled import CASES
from heatsink.benchmarks.environment import why_not
from heatsink.benchmarks.family import Cost, Family, LeftOut, Variant, compulsory_bytes
from heatsink.kernels._op import Inputs

BACKENDS = {
    "FLASH_ATTENTION": "SDPA flash",
    "EFFICIENT_ATTENTION": "SDPA efficient",
    "CUDNN_ATTENTION": "SDPA cuDNN",
    "MATH": "SDPA math",
}
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """PyTorch's SDPA on `(B, S, H, D)`; PyTorch chooses the backend."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if causal and bias is not None:
        # SDPA takes one or the other.
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        bias, causal = torch.where(hidden, -torch.inf, bias), False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return out.transpose(1, 2)


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """SDPA head by head, so that float64 scores of long sequences fit into memory."""
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    bias = options.pop("bias", None)
    for batch in range(q.shape[0]):
        for head in range(q.shape[2]):
            part = (slice(batch, batch + 1), slice(None), slice(head, head + 1))
            mine = bias
            if bias is not None:
                whole = bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
                mine = whole[batch : batch + 1, head : head + 1]
            out[part] = sdpa(q[part], k[part], v[part], bias=mine, **options)
    return out


def _backend(name: str) -> Callable[[], AbstractContextManager[Any]]:
    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, name)):
            yield

    return scope


def _prepare_sdpa(inputs: Inputs) -> Callable[[], Tensor]:
    arguments = _plain(inputs)
    return lambda: sdpa(**arguments)


def _sdpa_variants() -> list[Variant]:
    return [Variant(label, _prepare_sdpa, scope=_backend(name)) for name, label in BACKENDS.items()]


def _xformers(inputs: Inputs) -> Callable[[], Any]:
    attention = import_module("xformers.ops").memory_efficient_attention
    options: dict[str, Any] = {"scale": inputs.get("scale")}
    if inputs.get("causal"):
        options["attn_bias"] = import_module("xformers.ops").LowerTriangularMask()
    elif inputs.get("bias") is not None:
        options["attn_bias"] = inputs["bias"]
    return lambda: attention(inputs["q"], inputs["k"], inputs["v"], **options)


def _flash3(inputs: Inputs) -> Callable[[], Any]:
    if inputs.get("bias") is not None:
        raise ValueError("it takes no bias")
    attention = import_module("flash_attn_interface").flash_attn_func
    options = {"softmax_scale": inputs.get("scale"), "causal": bool(inputs.get("causal"))}
    return lambda: attention(inputs["q"], inputs["k"], inputs["v"], **options)


def _sage(inputs: Inputs) -> Callable[[], Any]:
    if inputs.get("bias") is not None:
        raise ValueError("it takes no bias")
    attention = import_module("sageattention").sageattn
    options = {"sm_scale": inputs.get("scale"), "is_causal": bool(inputs.get("causal"))}
    q, k, v = (inputs[name] for name in "qkv")
    return lambda: attention(q, k, v, tensor_layout="NHD", **options)


def _first(outputs: Any) -> Any:
    # Some versions return the log-sum-exp beside the output.
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _libraries() -> list[Variant | LeftOut]:
    wanted = {
        "xformers.ops": Variant("xformers", _xformers, view=_first),
        "flash_attn_interface": Variant("FlashAttention-3", _flash3, view=_first),
        "sageattention": Variant("SageAttention", _sage, view=_first, tolerance=0.05),
    }
    found: list[Variant | LeftOut] = []
    for module, variant in wanted.items():
        reason = why_not(module)
        found.append(LeftOut(variant.name, reason) if reason else variant)
    return found


def others(inputs: Inputs) -> Sequence[Variant | LeftOut]:
    """SDPA with each backend by name, and the libraries that are here."""
    return [*_sdpa_variants(), *_libraries()]


def _pairs(inputs: Inputs) -> int:
    """Pairs of query and key that meet, in all heads."""
    batch, queries, heads, _ = inputs["q"].shape
    keys = inputs["k"].shape[1]
    if inputs.get("causal"):
        # Query i sees the first i + 1 keys.
        return int(batch * heads * sum(min(i + 1, keys) for i in range(queries)))
    return int(batch * heads * queries * keys)


def cost(inputs: Inputs, outputs: Any) -> Cost:
    """Two matrix products, and an exponential for each pair of query and key."""
    pairs = _pairs(inputs)
    flops = 2 * pairs * (inputs["q"].shape[3] + inputs["v"].shape[3])
    return Cost(compulsory_bytes(inputs, outputs), {_DTYPES[inputs["q"].dtype]: flops}, pairs)


def cost_8bit(inputs: Inputs, outputs: Any) -> Cost:
    """The same work, the products at 8 bits' rate; quantising is in the times, not in this."""
    pairs = _pairs(inputs)
    scores, values = 2 * pairs * inputs["q"].shape[3], 2 * pairs * inputs["v"].shape[3]
    if inputs.get("pure"):
        flops = {"fp8": scores + values}
    else:
        flops = {"int8": scores, _DTYPES[inputs["q"].dtype]: values}
    return Cost(compulsory_bytes(inputs, outputs), flops, pairs)


def _plain(inputs: Inputs) -> Inputs:
    """The inputs without what only the 8-bit op takes."""
    return {name: value for name, value in inputs.items() if name != "pure"}


def _without_pure(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda **inputs: compute(**_plain(inputs))


FAMILIES = {
    "attention": Family(sdpa, others, cost, CASES["attention"], exact),
    # The tolerances are what the op's documentation promises.
    "attention_fp8": Family(
        _without_pure(sdpa),
        others,
        cost_8bit,
        exact=_without_pure(exact),
        tolerance=lambda inputs: 0.07 if inputs.get("pure") else 0.02,
    ),
}
