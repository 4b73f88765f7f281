"""Adapters merged into a pipeline's weights: as diffusers fuses them, and off again exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import heatsink
from heatsink.runtime.adapter_delta import AdapterDelta, digest_deltas
from heatsink.runtime.adapter_file import write_adapter
from heatsink.runtime.errors import (
    AdapterError,
    CallerError,
    InvalidRequest,
    NonFiniteWeights,
    UnknownAdapter,
)
from heatsink.runtime.model import Model

Make = Callable[..., list[AdapterDelta]]
PROMPTS = ["a red apple", "two cats"]


def state(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{component}.{name}": value.detach().clone()
        for component in ("unet", "text_encoder", "text_encoder_2")
        if getattr(pipe, component, None) is not None
        for name, value in getattr(pipe, component).named_parameters()
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    ("dtype", "dora"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
)
def test_merged_as_diffusers_fuses_within_a_rounding(
    dtype: torch.dtype,
    dora: bool,
    tiny_sd1: Path,
    tmp_path: Path,
    deltas_for: Make,
    load_pipeline: Callable[..., Any],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    pipe, other = load_pipeline(tiny_sd1, dtype), load_pipeline(tiny_sd1, dtype)
    base, deltas = state(pipe), deltas_for(pipe, dora=dora)
    file = tmp_path / "a.safetensors"
    write_adapter(file, deltas)
    other.load_lora_weights(tmp_path, weight_name=file.name)
    other.fuse_lora(components=["unet", "text_encoder"], lora_scale=0.8)
    theirs = {name.replace(".base_layer.", "."): value for name, value in state(other).items()}
    adapters = heatsink.adapters(pipe)
    assert adapters.add("a", str(file)) == digest_deltas(deltas)
    receipt = adapters.receipts["a"]
    assert receipt.digest == adapters.digests["a"]
    assert len(receipt.applied) == (3 if dora else 2) * len(deltas)
    adapters.use({"a": 0.8})
    changed, mine = {f"{d.component}.{d.weight_name}": d for d in deltas}, state(pipe)
    eps = torch.finfo(dtype).eps
    for name, before in base.items():
        if name not in changed:
            assert torch.equal(mine[name], before), name
            continue
        d = changed[name]
        change = 0.8 * d.scale * (d.b.double() @ d.a.double().flatten(1)).reshape(before.shape)
        reference = before.double() + change
        if d.magnitude is not None:
            gain = d.magnitude.double() / reference.flatten(1).norm(dim=1)
            reference = reference * gain.reshape(-1, *[1] * (reference.dim() - 1))
        plain = (theirs[name].double() - reference).abs().max()
        ours = (mine[name].double() - reference).abs().max()
        assert ours <= 2 * (plain + eps * reference.abs().max()), name
        assert (mine[name].double() - theirs[name].double()).abs().max() <= plain + ours
        assert (mine[name].double() - before.double()).abs().max() > 1e-3, name
    adapters.close()
    assert same(state(pipe), base)


@pytest.mark.parametrize("keep", ["device", "host", "mapped"])
def test_what_was_merged_comes_off_bit_by_bit(
    keep: Any, tiny_sd1: Path, sd1: Any, deltas_for: Make, latents_of: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    start, base = torch.randn(2, 4, 8, 8), state(sd1)
    plain = latents_of(sd1, PROMPTS, start)
    model = Model.open(tiny_sd1) if keep == "mapped" else None
    adapters = heatsink.adapters(sd1, keep=keep, model=model)
    for name, rank in (("a", 3), ("b", 5)):
        adapters.add(name, deltas_for(sd1, rank))
    adapters.add("d", deltas_for(sd1, 2, dora=True))
    places = {name: value.data_ptr() for name, value in sd1.unet.named_parameters()}
    states, images = {}, {}
    choices = {
        "a": {"a": 1.0},
        "ab": {"a": 0.6, "b": 0.4},
        "d": {"d": 1.0},
        "ba": {"b": 0.4, "a": 0.6},
    }
    for name, choice in choices.items():
        adapters.use(choice)
        states[name], images[name] = state(sd1), latents_of(sd1, PROMPTS, start)
        assert not torch.equal(images[name], plain)
    # The order of the names does not matter.
    assert same(states["ab"], states["ba"])
    assert not same(states["a"], states["ab"])
    for name in ("ab", "a", "d", "a", "ba"):
        adapters.use(choices[name])
        assert same(state(sd1), states[name])
        assert torch.equal(latents_of(sd1, PROMPTS, start), images[name])
    adapters.use({"a": 0.0})
    assert same(state(sd1), base)
    adapters.use(choices["d"])
    adapters.use(None)
    assert same(state(sd1), base)
    assert torch.equal(latents_of(sd1, PROMPTS, start), plain)
    assert {name: value.data_ptr() for name, value in sd1.unet.named_parameters()} == places


def test_closing_leaves_the_pipeline_as_it_was_found(sd1: Any, deltas_for: Make, seed: int) -> None:
    torch.manual_seed(seed)

    def look() -> Any:
        modules = [
            m
            for c in sd1.components.values()
            if isinstance(c, torch.nn.Module)
            for m in c.modules()
        ]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
        others = [
            len(getattr(m, name))
            for m in modules
            for name in (
                "_forward_hooks_with_kwargs",
                "_forward_hooks_always_called",
                "_forward_pre_hooks_with_kwargs",
            )
        ]
        return (
            dict(vars(sd1)),
            [id(m) for m in modules],
            hooks,
            others,
            [id(p) for p in sd1.unet.parameters()],
        )

    before, base = look(), state(sd1)
    for choice in (None, {"a": 1.0}, [{"a": 1.0}, None]):
        with heatsink.adapters(sd1) as adapters:
            adapters.add("a", deltas_for(sd1))
            adapters.use(choice)
            assert adapters.in_use == choice
            assert heatsink.adapters(sd1) is adapters
            with pytest.raises(CallerError, match="has adapters already"):
                heatsink.adapters(sd1, keep="host")
        assert look() == before
        assert same(state(sd1), base)
        adapters.close()
        with pytest.raises(CallerError, match="are closed"):
            adapters.use(None)


@pytest.mark.parametrize("choice", [{"a": 1.0}, [{"a": 1.0}]])
@pytest.mark.parametrize("change", ["overwritten", "truncated"])
def test_what_was_added_does_not_change_with_its_file(
    choice: Any,
    change: str,
    sd1: Any,
    deltas_for: Make,
    latents_of: Any,
    tmp_path: Path,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    file, noise = tmp_path / "a.safetensors", torch.randn(1, 4, 8, 8)
    write_adapter(file, deltas_for(sd1))
    adapters = heatsink.adapters(sd1)
    digest = adapters.add("a", file)
    adapters.use(choice)
    wanted, merged = latents_of(sd1, PROMPTS[:1], noise), state(sd1)
    adapters.remove()
    adapters.drop("a")
    adapters.add("a", file)
    # In place: what is mapped has these bytes from now on, or none.
    with file.open("r+b") as opened:
        if change == "truncated":
            opened.truncate(64)
        else:
            start = int.from_bytes(opened.read(8), "little") + 8
            opened.seek(start)
            opened.write(bytes(file.stat().st_size - start))
    assert adapters.digests == {"a": digest}
    adapters.use(choice)
    assert same(state(sd1), merged)
    assert torch.equal(latents_of(sd1, PROMPTS[:1], noise), wanted)


def test_names_and_choices_are_checked(sd1: Any, deltas_for: Make, seed: int) -> None:
    torch.manual_seed(seed)
    adapters, base = heatsink.adapters(sd1), state(sd1)
    adapters.add("a", deltas_for(sd1))
    with pytest.raises(CallerError, match="an adapter 'a' already"):
        adapters.add("a", deltas_for(sd1))
    wrong: list[tuple[Any, type[Exception], str]] = [
        ({"b": 1.0}, UnknownAdapter, r"no adapter 'b'; there are \['a'\]"),
        ([{"b": 1.0}], UnknownAdapter, "no adapter 'b'"),
        ({"a": "1"}, InvalidRequest, "the weight of 'a' is '1'"),
        ({"a": float("inf")}, InvalidRequest, "the weight of 'a' is inf"),
        ([{"a": True}], InvalidRequest, "the weight of 'a' is True"),
        ("a", InvalidRequest, "use takes names with weights"),
        ([], InvalidRequest, "use takes names with weights"),
        (["a"], InvalidRequest, "a prompt's adapters are 'a'"),
    ]
    for choice, kind, message in wrong:
        with pytest.raises(kind, match=message):
            adapters.use(choice)
        assert adapters.in_use is None
    assert same(state(sd1), base)
    adapters.use({"a": 1.0})
    with pytest.raises(CallerError, match="'a' is in use"):
        adapters.drop("a")
    adapters.use([None, {"a": 1.0}])
    with pytest.raises(CallerError, match="'a' is in use"):
        adapters.drop("a")
    adapters.remove()
    adapters.drop("a")
    assert adapters.names == []
    adapters.close()


def test_a_failed_use_leaves_what_was_in_use(
    tiny_sd1: Path, load_pipeline: Callable[..., Any], deltas_for: Make, latents_of: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    pipe = load_pipeline(tiny_sd1, torch.float16)
    adapters = heatsink.adapters(pipe)
    good = deltas_for(pipe)
    adapters.add("a", good)
    adapters.add("huge", [AdapterDelta(d.component, d.module_path, d.a, d.b, 1e7) for d in good])
    adapters.use({"a": 1.0})
    before = state(pipe)
    with pytest.raises(NonFiniteWeights, match="merged weights hold NaN or infinity"):
        adapters.use({"a": 1.0, "huge": 1.0})
    assert same(state(pipe), before)
    assert adapters.in_use == {"a": 1.0}
    nan = [AdapterDelta(d.component, d.module_path, d.a * float("nan"), d.b) for d in good]
    adapters.add("nan", nan)
    with pytest.raises(AdapterError, match="non-finite: a holds NaN"):
        adapters.use({"nan": 1.0})
    misplaced = [AdapterDelta("unet", "nowhere", good[0].a, good[0].b)]
    with pytest.raises(AdapterError, match=r"unet has no weight nowhere\.weight"):
        adapters.add("misplaced", misplaced)
    assert same(state(pipe), before)
    assert adapters.names == ["a", "huge", "nan"]


def test_what_merging_keeps_is_told_and_can_be_changed(
    tiny_sd1: Path, sd1: Any, deltas_for: Make, seed: int
) -> None:
    torch.manual_seed(seed)
    adapters, base = heatsink.adapters(sd1), state(sd1)
    small = deltas_for(sd1, components=("text_encoder", "unet"))
    adapters.add("a", small)
    size = sum(base[f"{d.component}.{d.weight_name}"].nbytes for d in small)
    told = adapters.costs("a")
    assert (told["device"].host, told["mapped"].disk) == (size, size)
    assert adapters.cost.host == 0
    adapters.use({"a": 1.0})
    merged = state(sd1)
    assert adapters.cost == told["device"]
    adapters.keep("mapped", Model.open(tiny_sd1))
    assert same(state(sd1), base)
    adapters.use({"a": 1.0})
    assert adapters.cost == told["mapped"]
    assert same(state(sd1), merged)
    for keep, model in (("mapped", None), ("host", Model.open(tiny_sd1))):
        with pytest.raises(CallerError, match="model= is given with 'mapped'"):
            adapters.keep(keep, model)  # type: ignore[arg-type]
    with pytest.raises(CallerError, match="no adapter 'z'"):
        adapters.costs("z")
    adapters.close()
    assert same(state(sd1), base)


def test_sdxl_reads_kohyas_names_and_both_text_encoders(
    sdxl: Any, tmp_path: Path, deltas_for: Make, seed: int
) -> None:
    torch.manual_seed(seed)
    base = state(sdxl)
    deltas = deltas_for(sdxl, components=("unet", "text_encoder", "text_encoder_2"))
    digests = set()
    adapters = heatsink.adapters(sdxl)
    for format in ("kohya", "diffusers"):
        write_adapter(tmp_path / f"{format}.safetensors", deltas, format)
        digests.add(adapters.add(format, tmp_path / f"{format}.safetensors"))
    assert len(digests) == 1
    adapters.use({"kohya": 0.5, "diffusers": 0.25})
    changed = {name for name, value in state(sdxl).items() if not torch.equal(value, base[name])}
    assert changed == {f"{d.component}.{d.weight_name}" for d in deltas}
    adapters.close()
    assert same(state(sdxl), base)


def test_a_file_of_another_architecture_is_refused_whole(
    sd1: Any, sdxl: Any, tmp_path: Path, deltas_for: Make, seed: int
) -> None:
    torch.manual_seed(seed)
    write_adapter(
        tmp_path / "a.safetensors", deltas_for(sdxl, components=("unet", "text_encoder_2"))
    )
    adapters = heatsink.adapters(sd1)
    with pytest.raises(AdapterError, match="can't be applied, so none is") as caught:
        adapters.add("a", tmp_path / "a.safetensors")
    assert adapters.receipts == {}
    assert any(
        "the model has no text_encoder_2" in reason for reason in caught.value.refused.values()
    )
    assert adapters.names == []
