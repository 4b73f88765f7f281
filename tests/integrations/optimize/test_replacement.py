"""The replaced modules as modules: what they keep, compute and refuse."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import heatsink
from heatsink.integrations.programs import MAX_GRAPHS
from heatsink.runtime.errors import InvalidRequest, NotBuilt
from heatsink.runtime.graph.weight import IDENTITY

Pair = tuple[Any, Any]
Make = Callable[[], Any]
NAMES = ("text_encoder", "unet", "vae")


def unet_inputs(rows: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(4)
    return {
        "sample": torch.randn(rows, 4, 8, 8, generator=draw).to(dtype),
        "timestep": 7,
        "encoder_hidden_states": torch.randn(rows, 16, 32, generator=draw).to(dtype),
    }


def test_a_replaced_module_answers_as_the_original(sd1: Pair) -> None:
    from diffusers import UNet2DConditionModel

    plain, fast = sd1
    for name in NAMES:
        found, wanted = getattr(fast, name), getattr(plain, name)
        assert dict(found.config.to_dict() if name == "text_encoder" else found.config)
        assert (found.dtype, found.device) == (wanted.dtype, wanted.device)
        assert list(found.state_dict()) == list(wanted.state_dict())
        assert isinstance(found, type(wanted))
        assert not found.training
    assert isinstance(fast.unet, UNet2DConditionModel)
    assert fast.unet.config.cross_attention_dim == 32
    assert fast.device == plain.device


def test_graphs_of_a_module_share_its_weights(make_sd1: Make) -> None:
    pipe = make_sd1()
    heatsink.optimize(pipe, components=["vae"])
    with torch.no_grad():
        for width in (4, 6):
            pipe.vae.decode(torch.zeros(1, 4, 4, width))
    first, second = pipe.vae._programs.components
    origins = first.graph.origins
    assert {id(v) for v in first._constants.values()} == {id(v) for v in second._constants.values()}
    # Those that a pass made too, q, k and v of its attention say.
    assert any(len(parts) > 1 for parts in origins.values())
    own = {value.data_ptr() for value in pipe.vae.original.parameters()}
    lies = {name for name, value in first._constants.items() if value.data_ptr() in own}
    assert lies == {n for n, parts in origins.items() if [p.transform for p in parts] == [IDENTITY]}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("class_labels", torch.zeros(2)),
        ("timestep_cond", torch.zeros(2, 4)),
        ("attention_mask", torch.ones(2, 64)),
        ("encoder_attention_mask", torch.ones(2, 16)),
        ("cross_attention_kwargs", {"scale": 0.5}),
        ("down_intrablock_additional_residuals", [torch.zeros(2, 32, 8, 8)]),
        ("down_block_additional_residuals", [torch.zeros(2, 32, 8, 8)]),
        ("mid_block_additional_residual", torch.zeros(2, 64, 4, 4)),
        ("added_cond_kwargs", {"image_embeds": torch.zeros(2, 4)}),
    ],
)
def test_the_unet_refuses_what_its_program_lacks(sd1: Pair, argument: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"unet: argument '{argument}'"):
        sd1[1].unet(**unet_inputs(), **{argument: value})


def test_empty_arguments_mean_nothing(sd1: Pair) -> None:
    plain, fast = sd1
    given: dict[str, Any] = {"cross_attention_kwargs": {}, "added_cond_kwargs": {}}
    with torch.no_grad():
        found = fast.unet(**unet_inputs(), **given, return_dict=False)
        wanted = plain.unet(**unet_inputs(), return_dict=False)
    assert isinstance(found, tuple)
    assert torch.allclose(found[0], wanted[0], atol=1e-5)


def test_inputs_of_another_dtype_and_gradients_are_refused(sd1: Pair) -> None:
    unet = sd1[1].unet
    with pytest.raises(InvalidRequest, match=r"'sample' wants torch\.float32, got torch\.float16"):
        unet(**unet_inputs(dtype=torch.float16))
    given = unet_inputs()
    given["sample"].requires_grad_()
    with pytest.raises(InvalidRequest, match="'sample' requires a gradient"):
        unet(**given)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(InvalidRequest, match="autocast"),
    ):
        unet(**unet_inputs())
    with pytest.raises(InvalidRequest, match="inference only"):
        unet.train()


def test_times_are_one_for_all_or_one_a_row(sd1: Pair) -> None:
    plain, fast = sd1
    given = {**unet_inputs(), "timestep": torch.tensor([3, 900])}
    with torch.no_grad():
        assert torch.allclose(fast.unet(**given).sample, plain.unet(**given).sample, atol=1e-5)
    with pytest.raises(InvalidRequest, match="'timestep' wants 1 or 2 times, got 3"):
        fast.unet(**{**given, "timestep": torch.tensor([3, 900, 4])})


def test_sdxl_wants_its_conditions(sdxl: Pair) -> None:
    given = {**unet_inputs(), "encoder_hidden_states": torch.zeros(2, 16, 80)}
    with pytest.raises(InvalidRequest, match=r"added_cond_kwargs' wants \['text_embeds', 'time_i"):
        sdxl[1].unet(**given)


@pytest.mark.parametrize("name", ["enable_freeu", "set_attn_processor", "fuse_qkv_projections"])
def test_what_would_change_the_network_is_not_there(sd1: Pair, name: str) -> None:
    with pytest.raises(AttributeError, match=rf"{name} is not available while Heatsink"):
        getattr(sd1[1].unet, name)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'"):
        _ = sd1[1].unet.no_such_thing


@pytest.mark.parametrize("kind", ["text_encoder", "text_encoder_2"])
def test_text_encoders_give_every_layer(sdxl: Pair, kind: str) -> None:
    plain, fast = (getattr(pipe, kind) for pipe in sdxl)
    ids = torch.randint(0, 500, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = (m(ids, output_hidden_states=True) for m in (fast, plain))
        short = fast(ids)
    assert list(found.keys()) == list(wanted.keys())
    assert len(found.hidden_states) == len(wanted.hidden_states) == 4
    for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
    assert torch.allclose(short[0], wanted[0], atol=1e-5)
    assert short.hidden_states is None
    with torch.no_grad():
        pair = fast(ids, return_dict=False), plain(ids, return_dict=False)
    assert len(pair[0]) == len(pair[1])
    assert torch.allclose(pair[0][1], pair[1][1], atol=1e-5)


def test_text_encoders_refuse_masks(sd1: Pair) -> None:
    ids = torch.zeros(1, 16, dtype=torch.int64)
    for name in ("attention_mask", "position_ids", "inputs_embeds"):
        with pytest.raises(InvalidRequest, match=f"text_encoder: argument '{name}'"):
            sd1[1].text_encoder(ids, **{name: ids})
    with pytest.raises(InvalidRequest, match=r"'input_ids' wants torch\.int64, got torch\.int32"):
        sd1[1].text_encoder(ids.int())


def test_the_autoencoder_forward_and_tiling(sd1: Pair) -> None:
    plain, fast = (pipe.vae for pipe in sd1)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    with torch.no_grad():
        found, wanted = (
            vae(image, sample_posterior=True, generator=draw).sample
            for vae, draw in zip((fast, plain), draws, strict=True)
        )
        assert torch.allclose(found, wanted, atol=1e-5)
        before = len(fast.graphs())
        fast.enable_tiling()
        try:
            # Larger than a tile: the original's own, bit by bit.
            wide = torch.rand(1, 4, 8, 16)
            plain.enable_tiling()
            assert torch.equal(fast.decode(wide).sample, plain.decode(wide).sample)
            assert len(fast.graphs()) == before
        finally:
            fast.disable_tiling()
            plain.disable_tiling()


def test_slicing_may_be_on_before(make_sd1: Make) -> None:
    pipe = make_sd1()
    pipe.vae.enable_slicing()
    heatsink.optimize(pipe, components=["vae"])
    latents = torch.rand(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = pipe.vae.original.decode(latents).sample
        sliced = pipe.vae.decode(latents).sample
        assert pipe.vae.use_slicing
        pipe.vae.disable_slicing()
        whole = pipe.vae.decode(latents).sample
    assert torch.allclose(sliced, wanted, atol=1e-5)
    assert torch.allclose(whole, wanted, atol=1e-5)
    # Both are the one graph's.
    assert len(pipe.vae.graphs()) == 1


def test_moving_and_casting_reach_the_original(make_sd1: Make) -> None:
    pipe = make_sd1()
    vae = pipe.vae
    latents = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    heatsink.optimize(pipe, components=["vae"])
    with torch.no_grad():
        full = pipe.vae.decode(latents).sample
        pipe.vae.to(dtype=torch.bfloat16)
        assert vae.dtype == pipe.vae.dtype == torch.bfloat16
        half = pipe.vae.decode(latents.bfloat16()).sample
        assert half.dtype == torch.bfloat16
        plain = vae.decode(latents.bfloat16()).sample
        error, plain_error = (float((image - full).abs().max()) for image in (half, plain))
        assert 0 < error <= 2 * (plain_error + 2**-8 * float(full.abs().max()))
        pipe.vae.to(dtype=torch.float32)
        again = pipe.vae.decode(latents).sample
        wanted = vae.decode(latents).sample
    # The weights were rounded on the way, for both.
    assert not torch.equal(again, full)
    assert torch.allclose(again, wanted, atol=1e-5)
    # The float32 graph is the one from before.
    assert len(pipe.vae.graphs()) == 2


def test_an_offloading_hook_moves_the_weights_in_first(make_sd1: Make) -> None:
    class Hook:
        def pre_forward(self, module: Any) -> None:
            module.to(dtype=torch.bfloat16)

    pipe = make_sd1()
    heatsink.optimize(pipe, components=["vae"])
    pipe.vae._hf_hook = Hook()
    with torch.no_grad():
        found = pipe.vae.decode(torch.rand(1, 4, 4, 4).bfloat16()).sample
    assert found.dtype == torch.bfloat16


def test_precision_is_what_the_program_computes_in(make_sd1: Make) -> None:
    pipe, half = make_sd1(), make_sd1().vae.to(torch.bfloat16)
    latents = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = pipe.vae.decode(latents).sample
        rounded = half.decode(latents.bfloat16()).sample
        heatsink.optimize(pipe, components=["vae"], precision="bf16")
        found = pipe.vae.decode(latents).sample
    (graph,) = pipe.vae.graphs()
    assert graph.dtype == torch.bfloat16
    assert found.dtype == pipe.vae.dtype == torch.float32
    error, plain = (float((image - wanted).abs().max()) for image in (found, rounded))
    assert 0 < error <= 2 * (plain + 2**-8 * float(wanted.abs().max()))


def test_an_operation_that_no_pass_knows_runs_unfused(make_sd1: Make) -> None:
    pipe = make_sd1()
    pipe.vae.decoder.conv_act = torch.nn.Softshrink(0.1)
    latents = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = pipe.vae.decode(latents).sample
        heatsink.optimize(pipe, components=["vae"])
        assert torch.allclose(pipe.vae.decode(latents).sample, wanted, atol=1e-5)
    (component,) = pipe.vae._programs.components
    # It is the only one that the programs don't write in place.
    assert component.program(2).unplanned == [("aten.softshrink.default", "decoder.conv_act")]


def test_half_the_precision_keeps_the_image(
    make_sd1: Make, same_images: Callable[..., Tensor]
) -> None:
    plain, fast = make_sd1(), make_sd1()
    heatsink.optimize(fast, components=["unet"], precision="bf16")
    same_images((plain, fast), prompt=["a red apple", "a pear"], num_inference_steps=2, least=30)


def test_the_oldest_graphs_go(make_sd1: Make) -> None:
    pipe = make_sd1()
    heatsink.optimize(pipe, components=["vae"])
    captured: list[Any] = []

    def capture(*_: Any) -> Any:
        captured.append(None)
        raise NotBuilt("not in this test")

    unit, face = pipe.vae._programs, pipe.vae
    for index in range(MAX_GRAPHS):
        unit._graphs["vae", index] = None
    unit._capture = capture
    with torch.no_grad(), pytest.raises(NotBuilt):
        face.decode(torch.zeros(1, 4, 4, 4))
    assert len(captured) == 1
    del unit._capture
    with torch.no_grad():
        face.decode(torch.zeros(1, 4, 4, 4))
    assert len(face.graphs()) == MAX_GRAPHS
    assert ("vae", 0) not in unit._graphs


def test_threads_take_turns(sd1: Pair) -> None:
    plain, fast = sd1
    given = [unet_inputs(rows) for rows in (1, 2, 3)]
    with torch.no_grad():
        wanted = [plain.unet(**inputs).sample for inputs in given]
    found: dict[int, Tensor] = {}

    def work(which: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                found[which] = fast.unet(**given[which]).sample

    threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which, value in enumerate(wanted):
        assert torch.allclose(found[which], value, atol=1e-5)
