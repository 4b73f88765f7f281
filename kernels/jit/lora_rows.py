"""The bodies of `heatsink.kernels.lora_rows`: shrink, expand, and both in one program."""

from __future__ import annotations

import triton
import triton.language as tl

from heatsink.kernels.jit.lora_rows_tiles import expand, shrink, survey


@triton.jit(
    do_not_specialize=[
        "slots",
        "rank",
        "adapters",
        "stride_ht",
        "stride_xr",
        "stride_xh",
        "stride_xs",
        "stride_as",
        "stride_ar",
        "stride_ac",
        "stride_at",
    ]
)
def _lora_shrink_kernel(
    h_ptr,
    slots_ptr,
    ranks_ptr,
    slots,
    rank,
    adapters,
    tokens,
    stride_ht,
    x_ptr,
    a_ptr,
    scales_ptr,
    inputs,
    height,
    width,
    out_width,
    step_h,
    step_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    stride_xr,
    stride_xh,
    stride_xs,
    stride_as,
    stride_ar,
    stride_ac,
    stride_at,
    X_UNIT: tl.constexpr,
    A_UNIT: tl.constexpr,
    H_UNIT: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL_W: tl.constexpr,
    LINEAR: tl.constexpr,
    X_INSIDE: tl.constexpr,
    A_INSIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Programs along parts of the sum, then tiles of tokens, then rows.
    tiles = tl.cdiv(tokens, BLOCK_T)
    part = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS % tiles
    row = (tl.program_id(0) // SPLITS // tiles).to(tl.int64)
    steps = tl.cdiv(inputs, BLOCK_K) * TAPS
    share = tl.cdiv(steps, SPLITS)
    span = (part * share, tl.minimum(part * share + share, steps))
    x = (
        x_ptr + row * (stride_xr * X_UNIT),
        stride_xh * X_UNIT,
        stride_xs * X_UNIT,
        stride_xs * X_UNIT,
    )
    a = (a_ptr, stride_as * A_UNIT, stride_ar * A_UNIT, stride_ac * A_UNIT, stride_at * A_UNIT)
    window = (height, width, out_width, step_h, step_w, pad_h, pad_w, dil_h, dil_w)
    shrink(
        x,
        a,
        h_ptr,
        scales_ptr,
        (slots_ptr, ranks_ptr, slots, rank),
        window,
        row,
        tile * BLOCK_T,
        span,
        tokens,
        inputs,
        adapters,
        stride_ht * H_UNIT,
        part,
        LINEAR,
        X_INSIDE,
        A_INSIDE,
        KERNEL_W,
        SPLITS,
        BLOCK_T,
        BLOCK_K,
        BLOCK_R,
        PRECISION,
        UPCAST,
    )


@triton.jit(
    do_not_specialize=[
        "slots",
        "rank",
        "adapters",
        "stride_ht",
        "stride_yr",
        "stride_ys",
        "stride_bs",
        "stride_br",
    ]
)
def _lora_expand_kernel(
    h_ptr,
    slots_ptr,
    ranks_ptr,
    slots,
    rank,
    adapters,
    tokens,
    stride_ht,
    y_ptr,
    b_ptr,
    outputs,
    stride_yr,
    stride_ys,
    stride_bs,
    stride_br,
    H_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    B_UNIT: tl.constexpr,
    Y_INSIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Programs along blocks of outputs, then tiles of tokens, then rows.
    blocks = tl.cdiv(outputs, BLOCK_N)
    tiles = tl.cdiv(tokens, BLOCK_T)
    start_n = tl.program_id(0) % blocks * BLOCK_N
    tile = tl.program_id(0) // blocks % tiles
    row = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    bank = (slots_ptr, ranks_ptr, slots, rank)
    used, wrong = survey(bank, row, adapters)
    if used > 0:
        expand(
            (y_ptr + row * (stride_yr * Y_UNIT), stride_ys * Y_UNIT),
            h_ptr,
            (b_ptr, stride_bs * B_UNIT, stride_br * B_UNIT),
            bank,
            row,
            wrong,
            tile * BLOCK_T,
            start_n,
            tokens,
            outputs,
            adapters,
            stride_ht * H_UNIT,
            Y_INSIDE,
            SPLITS,
            BLOCK_T,
            BLOCK_N,
            BLOCK_E,
            PRECISION,
            UPCAST,
        )


@triton.jit(
    do_not_specialize=[
        "slots",
        "rank",
        "adapters",
        "stride_ht",
        "stride_xr",
        "stride_xh",
        "stride_xs",
        "stride_as",
        "stride_ar",
        "stride_ac",
        "stride_at",
        "stride_yr",
        "stride_ys",
        "stride_bs",
        "stride_br",
    ]
)
def _lora_fused_kernel(
    h_ptr,
    slots_ptr,
    ranks_ptr,
    slots,
    rank,
    adapters,
    tokens,
    stride_ht,
    x_ptr,
    a_ptr,
    scales_ptr,
    inputs,
    height,
    width,
    out_width,
    step_h,
    step_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    stride_xr,
    stride_xh,
    stride_xs,
    stride_as,
    stride_ar,
    stride_ac,
    stride_at,
    y_ptr,
    b_ptr,
    outputs,
    stride_yr,
    stride_ys,
    stride_bs,
    stride_br,
    X_UNIT: tl.constexpr,
    A_UNIT: tl.constexpr,
    H_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    B_UNIT: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL_W: tl.constexpr,
    LINEAR: tl.constexpr,
    X_INSIDE: tl.constexpr,
    A_INSIDE: tl.constexpr,
    Y_INSIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Programs along tiles of tokens, then rows. h is this program's own part of the scratch.
    tiles = tl.cdiv(tokens, BLOCK_T)
    start_t = tl.program_id(0) % tiles * BLOCK_T
    row = (tl.program_id(0) // tiles).to(tl.int64)
    bank = (slots_ptr, ranks_ptr, slots, rank)
    used, wrong = survey(bank, row, adapters)
    if used > 0:
        x = (
            x_ptr + row * (stride_xr * X_UNIT),
            stride_xh * X_UNIT,
            stride_xs * X_UNIT,
            stride_xs * X_UNIT,
        )
        a = (a_ptr, stride_as * A_UNIT, stride_ar * A_UNIT, stride_ac * A_UNIT, stride_at * A_UNIT)
        window = (height, width, out_width, step_h, step_w, pad_h, pad_w, dil_h, dil_w)
        shrink(
            x,
            a,
            h_ptr,
            scales_ptr,
            bank,
            window,
            row,
            start_t,
            (0, tl.cdiv(inputs, BLOCK_K) * TAPS),
            tokens,
            inputs,
            adapters,
            stride_ht * H_UNIT,
            0,
            LINEAR,
            X_INSIDE,
            A_INSIDE,
            KERNEL_W,
            1,
            BLOCK_T,
            BLOCK_K,
            BLOCK_R,
            PRECISION,
            UPCAST,
        )
        # Each thread reads what others of the program wrote.
        tl.debug_barrier()
        for start_n in range(0, outputs, BLOCK_N):
            expand(
                (y_ptr + row * (stride_yr * Y_UNIT), stride_ys * Y_UNIT),
                h_ptr,
                (b_ptr, stride_bs * B_UNIT, stride_br * B_UNIT),
                bank,
                row,
                wrong,
                start_t,
                start_n,
                tokens,
                outputs,
                adapters,
                stride_ht * H_UNIT,
                Y_INSIDE,
                1,
                BLOCK_T,
                BLOCK_N,
                BLOCK_E,
                PRECISION,
                UPCAST,
            )
