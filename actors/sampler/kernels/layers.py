"""Triton kernels of a layer between its products; actors/sampler/fused_decoder.py has the references."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 1024


def add_norm_triton(
    x: Tensor, y: Tensor, weight: Tensor, epsilon: float, centred: bool, post_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Same results as `actors.sampler.fused_decoder.add_norm` with norms of these weights; x and y contiguous.

    A program computes a row.
    """
    width = x.shape[-1]
    padded = triton.next_power_of_2(width)
    total, out = torch.empty_like(x), torch.empty_like(x)
    _add_norm[(x.numel() // width,)](
        x, y, weight, weight if post_weight is None else post_weight, total, out, epsilon, width,
        CENTRED=centred, POST=post_weight is not None, WIDTH=padded, num_warps=max(1, min(padded // 512, 16)),
    )  # fmt: skip
    return total, out


def gate_triton(gate_up: Tensor, tanh_gelu: bool) -> Tensor:
    """Same arguments and result as `actors.sampler.fused_decoder.gate`; contiguous."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    grid = (triton.cdiv(width, _CHUNK), out.numel() // width)
    _gate[grid](gate_up, out, width, TANH_GELU=tanh_gelu, CHUNK=_CHUNK)
    return out


@triton.jit
def scaled(normed, weight, kind: tl.constexpr, CENTRED: tl.constexpr):
    """float32 x / rms(x) times the norm's weight, in `kind`, rounded where the modules round."""
    if CENTRED:
        return (normed * (1.0 + weight.to(tl.float32))).to(kind)
    else:
        return normed.to(kind) * weight


@triton.jit
def _add_norm(
    x, y, weight, post_weight, total, out, epsilon, width,
    CENTRED: tl.constexpr, POST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, WIDTH)
    at = tl.program_id(0).to(tl.int64) * width + d
    there = d < width
    kind = x.dtype.element_ty
    residual = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    added = tl.load(y + at, mask=there, other=0.0).to(tl.float32)
    if POST:
        added *= tl.rsqrt(tl.sum(added * added, 0) / width + epsilon)
        added = scaled(added, tl.load(post_weight + d, mask=there, other=0.0), kind, CENTRED).to(tl.float32)
    rounded = (residual + added).to(kind)
    tl.store(total + at, rounded, mask=there)
    precise = rounded.to(tl.float32)
    shrink = tl.rsqrt(tl.sum(precise * precise, 0) / width + epsilon)
    normed = scaled(precise * shrink, tl.load(weight + d, mask=there, other=0.0), kind, CENTRED)
    tl.store(out + at, normed, mask=there)


@triton.jit
def _gate(gate_up, out, width, TANH_GELU: tl.constexpr, CHUNK: tl.constexpr):
    j = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    row = tl.program_id(1).to(tl.int64)
    there = j < width
    gate = tl.load(gate_up + row * (2 * width) + j, mask=there, other=0.0)
    up = tl.load(gate_up + row * (2 * width) + width + j, mask=there, other=0.0)
    precise = gate.to(tl.float32)
    slope = precise
    if TANH_GELU:  # (1 + tanh(z / 2)) / 2 is the sigmoid of z
        slope = 1.5957691216057308 * (precise + 0.044715 * precise * precise * precise)
    tl.store(out + row * width + j, (precise / (1 + tl.exp(-slope))).to(gate.dtype) * up, mask=there)
