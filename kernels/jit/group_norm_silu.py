"""The bodies of `heatsink.kernels.group_norm_silu`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _fold(
    inverse, offs_c, n, mask_c, weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_sn, stride_tn
):
    # gain and offset of y = (x - mean) * gain + offset, for channels of sample n.
    gain = inverse
    offset = tl.zeros_like(inverse)
    if weight_ptr is not None:
        gain *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        offset += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + n * stride_sn + offs_c, mask=mask_c, other=0.0)
        gain *= 1.0 + scale.to(tl.float32)
        offset *= 1.0 + scale.to(tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + n * stride_tn + offs_c, mask=mask_c, other=0.0)
        offset += shift.to(tl.float32)
    return gain, offset


@triton.jit(do_not_specialize=["pixels", "groups"])
def _group_norm_whole_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    pixels,
    channels,
    groups,
    stride_xn,
    stride_xp,
    stride_sn,
    stride_tn,
    eps,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SILU: tl.constexpr,
):
    blocks = tl.cdiv(groups, GROUPS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * GROUPS
    local = tl.arange(0, BLOCK_C)
    group = local // GROUP_SIZE
    offs_c = first * GROUP_SIZE + local
    offs_p = tl.arange(0, BLOCK_P)
    mask_c = (local < GROUPS * GROUP_SIZE) & (offs_c < channels)
    mask = (offs_p[:, None] < pixels) & mask_c[None, :]
    # Within a sample 32 bits do: the plan sees to it. More would not leave registers for the tile.
    offs = offs_p[:, None] * stride_xp + offs_c[None, :]
    x = tl.load(x_ptr + n * stride_xn + offs, mask=mask, other=0.0).to(tl.float32)

    # Groups are no power of two wide: a channel's sums go to its group through this matrix.
    member = (tl.arange(0, BLOCK_G)[:, None] == group[None, :]) & mask_c[None, :]
    count = (pixels * GROUP_SIZE).to(tl.float32)
    total = tl.sum(tl.where(member, tl.sum(x, 0)[None, :], 0.0), 1)
    mean = tl.sum(tl.where(member, (total / count)[:, None], 0.0), 0)
    distance = tl.where(mask, x - mean[None, :], 0.0)
    m2 = tl.sum(tl.where(member, tl.sum(distance * distance, 0)[None, :], 0.0), 1)
    inverse = 1.0 / tl.sqrt(m2 / count + eps)
    inverse = tl.sum(tl.where(member, inverse[:, None], 0.0), 0)

    gain, offset = _fold(
        inverse, offs_c, n, mask_c, weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_sn, stride_tn
    )
    y = distance * gain[None, :] + offset[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    out_offs = offs_p[:, None] * channels + offs_c[None, :]
    out_ptr += n * pixels * channels
    tl.store(out_ptr + out_offs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels", "chunks"])
def _group_norm_moments_kernel(
    x_ptr,
    mean_ptr,
    m2_ptr,
    pixels,
    channels,
    chunks,
    stride_xn,
    stride_xp,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    row = tl.program_id(0) // blocks
    n = (row // chunks).to(tl.int64)
    first = row % chunks * CHUNK
    offs_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_p = tl.arange(0, BLOCK_P)
    mask_c = offs_c < channels
    size = tl.minimum(pixels - first, CHUNK)
    x_ptr += n * stride_xn + first.to(tl.int64) * stride_xp

    # Welford's update in every lane: nothing crosses lanes before the end.
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, CHUNK, BLOCK_P):
        mask = (start + offs_p[:, None] < size) & mask_c[None, :]
        offs = (start + offs_p[:, None]).to(tl.int64) * stride_xp + offs_c[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        distance = tl.where(mask, x - mean, 0.0)
        mean += distance * (1.0 / (start // BLOCK_P + 1))
        m2 += distance * tl.where(mask, x - mean, 0.0)

    # Lane p has seen pixels p, p + BLOCK_P, ...: one fewer where the chunk is ragged.
    counts = tl.maximum((size - offs_p + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)[:, None]
    whole = tl.sum(counts * mean, 0) / size
    apart = mean - whole[None, :]
    out = row.to(tl.int64) * channels + offs_c
    tl.store(mean_ptr + out, whole, mask=mask_c)
    tl.store(m2_ptr + out, tl.sum(m2 + counts * apart * apart, 0), mask=mask_c)


@triton.jit(do_not_specialize=["pixels", "chunks", "groups", "group_size"])
def _group_norm_finish_kernel(
    mean_ptr,
    m2_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    coefficients_ptr,
    pixels,
    channels,
    chunks,
    groups,
    group_size,
    stride_sn,
    stride_tn,
    eps,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n = (tl.program_id(0) // groups).to(tl.int64)
    local = tl.arange(0, BLOCK_C)
    offs_c = tl.program_id(0) % groups * group_size + local
    mask_c = local < group_size
    offs_k = tl.arange(0, BLOCK_K)
    first = n * chunks * channels
    count = (pixels.to(tl.int64) * group_size).to(tl.float32)

    # Measured from one of the means, so that their sum does not outgrow what tells them apart.
    origin = tl.load(mean_ptr + first + tl.program_id(0) % groups * group_size)
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(0, chunks, BLOCK_K):
        k = start + offs_k[:, None]
        mask = (k < chunks) & mask_c[None, :]
        offs = first + k.to(tl.int64) * channels + offs_c[None, :]
        means = tl.load(mean_ptr + offs, mask=mask, other=0.0)
        size = tl.minimum(pixels - k * CHUNK, CHUNK).to(tl.float32)
        total += tl.where(mask, (means - origin) * size, 0.0)
    mean = origin + tl.sum(tl.sum(total, 0), 0) / count
    m2 = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(0, chunks, BLOCK_K):
        k = start + offs_k[:, None]
        mask = (k < chunks) & mask_c[None, :]
        offs = first + k.to(tl.int64) * channels + offs_c[None, :]
        apart = tl.load(mean_ptr + offs, mask=mask, other=0.0) - mean
        size = tl.minimum(pixels - k * CHUNK, CHUNK).to(tl.float32)
        inside = tl.load(m2_ptr + offs, mask=mask, other=0.0)
        m2 += tl.where(mask, inside + apart * apart * size, 0.0)
    variance = tl.sum(tl.sum(m2, 0), 0) / count
    inverse = tl.zeros((BLOCK_C,), tl.float32) + 1.0 / tl.sqrt(variance + eps)

    gain, offset = _fold(
        inverse, offs_c, n, mask_c, weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_sn, stride_tn
    )
    coefficients_ptr += n * 3 * channels + offs_c
    tl.store(coefficients_ptr, tl.zeros_like(inverse) + mean, mask=mask_c)
    tl.store(coefficients_ptr + channels, gain, mask=mask_c)
    tl.store(coefficients_ptr + 2 * channels, offset, mask=mask_c)


@triton.jit(do_not_specialize=["pixels"])
def _group_norm_apply_kernel(
    x_ptr,
    coefficients_ptr,
    out_ptr,
    pixels,
    channels,
    stride_xn,
    stride_xp,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SILU: tl.constexpr,
):
    # The other way round than the moments were taken: what was read last is still in the L2.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    tiles = tl.cdiv(pixels, BLOCK_P)
    n = (pid // blocks // tiles).to(tl.int64)
    offs_c = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_p = pid // blocks % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_c = offs_c < channels
    mask = (offs_p[:, None] < pixels) & mask_c[None, :]
    coefficients_ptr += n * 3 * channels + offs_c
    mean = tl.load(coefficients_ptr, mask=mask_c, other=0.0)
    gain = tl.load(coefficients_ptr + channels, mask=mask_c, other=0.0)
    offset = tl.load(coefficients_ptr + 2 * channels, mask=mask_c, other=0.0)
    rows = offs_p[:, None].to(tl.int64)
    x = tl.load(x_ptr + n * stride_xn + rows * stride_xp + offs_c[None, :], mask=mask, other=0.0)
    y = (x.to(tl.float32) - mean[None, :]) * gain[None, :] + offset[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    out_ptr += n * pixels * channels
    out = out_ptr + rows * channels + offs_c[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)
