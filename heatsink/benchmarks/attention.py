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


def _sdpa_variants() -> list[Variant]:
    return [
        Variant(label, lambda inputs: lambda: sdpa(**inputs), scope=_backend(name))
        for name, label in BACKENDS.items()
    ]


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
        "sageattention": Variant("SageAttention", _sage, view=_first, approximate=True),
    }
    found: list[Variant | LeftOut] = []
    for module, variant in wanted.items():
        reason = why_not(module)
        found.append(LeftOut(variant.name, reason) if reason else variant)
    return found


def others(inputs: Inputs) -> Sequence[Variant | LeftOut]:
    """SDPA with each backend by name, and the libraries that are here."""
    return [*_sdpa_variants(), *_libraries()]


def _cost(inputs: Inputs, outputs: Any, dtype: str) -> Cost:
    batch, queries, heads, head_dim = inputs["q"].shape
    keys = inputs["k"].shape[1]
    pairs = batch * heads * queries * keys
    if inputs.get("causal"):
        # Query i sees the first i + 1 keys.
        seen = sum(min(i + 1, keys) for i in range(queries))
        pairs = batch * heads * seen
    width = head_dim + inputs["v"].shape[3]
    return Cost(compulsory_bytes(inputs, outputs), 2 * pairs * width, pairs, dtype)


def cost(inputs: Inputs, outputs: Any) -> Cost:
    """Two matrix products, and an exponential for each pair of query and key."""
    return _cost(inputs, outputs, _DTYPES[inputs["q"].dtype])


def fp8_cost(inputs: Inputs, outputs: Any) -> Cost:
    """The same work at fp8's rate; quantisation is not in it, but is in the times."""
    return _cost(inputs, outputs, "fp8")


FAMILIES = {
    "attention": Family(sdpa, others, cost, CASES["attention"], exact),
    "attention_fp8": Family(sdpa, others, fp8_cost, (), exact, approximate=True),
}
