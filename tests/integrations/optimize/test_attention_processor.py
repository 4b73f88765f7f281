"""The attention processor against diffusers' own, and that it is our operator that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import heatsink.kernels as hk
from heatsink.integrations.attention import HeatsinkAttnProcessor


def _attention(seed: int, **options: Any) -> Any:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(seed)
    given = {"query_dim": 12, "heads": 3, "dim_head": 5, **options}
    return Attention(**given).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the operator was called with."""
    seen: list[dict[str, Any]] = []
    own: Callable[..., Tensor] = hk.attention

    def noted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append({"q": q.shape, "k": k.shape, **options})
        return own(q, k, v, **options)

    monkeypatch.setattr(hk, "attention", noted)
    return seen


def _both(attn: Any, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        wanted = attn(*args, **options)
        attn.set_processor(HeatsinkAttnProcessor())
        return attn(*args, **options), wanted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "out_bias": False},
        {"residual_connection": True, "rescale_output_factor": 2.0},
        {"norm_num_groups": 4, "residual_connection": True},
        {"qk_norm": "layer_norm"},
    ],
)
def test_self_attention(calls: list[Any], seed: int, options: dict[str, Any]) -> None:
    attn = _attention(seed, **options)
    found, wanted = _both(attn, torch.randn(2, 7, 12))
    assert torch.allclose(found, wanted, atol=1e-5)
    assert [call["q"] for call in calls] == [(2, 7, 3, 5)]


def test_pixels(calls: list[Any], seed: int) -> None:
    attn = _attention(seed, norm_num_groups=4, residual_connection=True)
    found, wanted = _both(attn, torch.randn(2, 12, 3, 4))
    assert found.shape == (2, 12, 3, 4)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert calls[0]["k"] == (2, 12, 3, 5)


@pytest.mark.parametrize("norm", [None, "layer_norm"])
def test_cross_attention(calls: list[Any], seed: int, norm: str | None) -> None:
    attn = _attention(seed, cross_attention_dim=8, cross_attention_norm=norm)
    found, wanted = _both(attn, torch.randn(2, 7, 12), torch.randn(2, 4, 8))
    assert torch.allclose(found, wanted, atol=1e-5)
    assert calls[0]["k"] == (2, 4, 3, 5)


def test_a_mask_is_a_bias(calls: list[Any], seed: int) -> None:
    attn = _attention(seed, cross_attention_dim=8)
    mask = torch.zeros(2, 1, 4)
    mask[1, :, 2:] = -10000.0
    hidden, context = torch.randn(2, 7, 12), torch.randn(2, 4, 8)
    found, wanted = _both(attn, hidden, context, attention_mask=mask)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert calls[0]["bias"].shape == (2, 1, 1, 4)
    with torch.no_grad():
        kept = attn(hidden, context, attention_mask=mask == 0)
        by_head = attn(hidden, context, attention_mask=mask.repeat_interleave(3, 0))
        assert torch.allclose(kept, wanted, atol=1e-5)
        assert torch.allclose(by_head, wanted, atol=1e-5)
        assert not torch.allclose(attn(hidden, context), wanted, atol=1e-3)


def test_refusals(seed: int) -> None:
    attn = _attention(seed, cross_attention_dim=8)
    attn.set_processor(HeatsinkAttnProcessor())
    given = torch.randn(2, 7, 12), torch.randn(2, 4, 8)
    with torch.no_grad(), pytest.raises(ValueError, match=r"attention_mask: expected \(2 or 6, "):
        attn(*given, attention_mask=torch.zeros(2, 1, 5))
    with pytest.raises(ValueError, match="gradient"):
        attn(*given)
    attn.added_kv_proj_dim = 4
    with pytest.raises(ValueError, match="without added_kv_proj_dim"):
        attn(*given)


def test_a_pipeline_with_it_can_be_optimised(make_sd1: Callable[[], Any]) -> None:
    import heatsink

    pipe = make_sd1()
    draw = torch.Generator().manual_seed(2)
    given = (
        torch.randn(2, 4, 4, 4, generator=draw), 7, torch.randn(2, 16, 32, generator=draw),
    )  # fmt: skip
    with torch.no_grad():
        wanted = pipe.unet(*given).sample
        pipe.unet.set_attn_processor(HeatsinkAttnProcessor())
        eager = pipe.unet(*given).sample
        heatsink.optimize(pipe, components=["unet"])
        found = pipe.unet(*given).sample
    assert torch.allclose(eager, wanted, atol=1e-5)
    assert torch.allclose(found, wanted, atol=1e-5)
    (graph,) = pipe.unet.graphs()
    targets = [str(node.target) for node in graph.nodes]
    # Four blocks that attend to themselves and to the text.
    assert targets.count("heatsink.attention.default") == 2 * 4
    assert not any("scaled_dot_product" in target for target in targets)
