"""Triton kernels of a layer between its products; actors/sampler/fused_qwen3.py has the references."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 1024


def add_norm_triton(x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Same results as `actors.sampler.fused_qwen3.add_norm` with a norm of that weight; x and y contiguous.

    A program computes a row.
    """
    width = x.shape[-1]
    padded = triton.next_power_of_2(width)
    total, out = torch.empty_like(x), torch.empty_like(x)
    _add_norm[(x.numel() // width,)](
        x, y, weight, total, out, epsilon, width, WIDTH=padded, num_warps=max(1, min(padded // 512, 16))
    )
    return total, out


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """Same argument and result as `actors.sampler.fused_qwen3.swiglu`; contiguous."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    _swiglu[(triton.cdiv(width, _CHUNK), out.numel() // width)](gate_up, out, width, CHUNK=_CHUNK)
    return out


@triton.jit
def _add_norm(x, y, weight, total, out, epsilon, width, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH)
    at = tl.program_id(0).to(tl.int64) * width + d
    there = d < width
    kind = x.dtype.element_ty
    residual = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    rounded = (residual + tl.load(y + at, mask=there, other=0.0).to(tl.float32)).to(kind)
    tl.store(total + at, rounded, mask=there)
    precise = rounded.to(tl.float32)
    shrink = tl.rsqrt(tl.sum(precise * precise, 0) / width + epsilon)
    normed = (precise * shrink).to(kind) * tl.load(weight + d, mask=there, other=0.0)
    tl.store(out + at, normed, mask=there)


@triton.jit
def _swiglu(gate_up, out, width, CHUNK: tl.constexpr):
    j = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    row = tl.program_id(1).to(tl.int64)
    there = j < width
    gate = tl.load(gate_up + row * (2 * width) + j, mask=there, other=0.0)
    up = tl.load(gate_up + row * (2 * width) + width + j, mask=there, other=0.0)
    precise = gate.to(tl.float32)
    tl.store(out + row * width + j, (precise / (1 + tl.exp(-precise))).to(gate.dtype) * up, mask=there)
