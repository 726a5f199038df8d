"""The forward of a decoding pass of Qwen3, in fewer kernels than transformers' own.

A layer is eight kernels: four products, attention (which also norms and rotates the heads), SwiGLU, and twice a
residual sum together with the norm after it, where the second norm is the next layer's. After the attention of the last
layer only the wanted positions are computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3RMSNorm, apply_rotary_pos_emb

from actors.sampler.attention import slot_attention
from actors.sampler.cache import CacheRows, attention_inputs
from actors.sampler.projections import PackedLinear


class FusedQwen3:
    """Reads the model's own parameters, so new weights may be copied into them, and the cache attached to it."""

    def __init__(self, model: PreTrainedModel, compiled: bool) -> None:
        """`fits` must hold for the model."""
        self.model: Any = model.model
        self._before = torch.compile(before, dynamic=True) if compiled else before

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether this forward computes the model; its projections must be packed before."""
        return (
            type(model) is Qwen3ForCausalLM
            and isinstance(model.model.layers[0].self_attn.q_proj, PackedLinear)
            and model.config.hidden_act == "silu"
        )

    def __call__(self, ids: Tensor, positions: Tensor, rows: CacheRows, wanted: Tensor) -> Tensor:
        """Final hidden states [W, d] at `wanted` int64 [W], indices into the flattened ids [N, Q]."""
        layers = list(self.model.layers)
        next_norms = [*(layer.input_layernorm for layer in layers[1:]), self.model.norm]
        x, inner, cos, sin = self._before(ids, positions, self.model)
        for layer, next_norm in zip(layers, next_norms, strict=True):
            heads = attention(layer.self_attn, layer.self_attn.q_proj.product.of(inner), cos, sin, rows)
            if layer is layers[-1]:
                x, heads = x.flatten(0, 1)[wanted], heads.flatten(0, 1)[wanted]
            out = layer.self_attn.o_proj(heads.flatten(-2))
            x, inner = add_norm(x, out, layer.post_attention_layernorm)
            out = layer.mlp.down_proj(swiglu(layer.mlp.gate_proj.product.of(inner)))
            x, inner = add_norm(x, out, next_norm)
        return inner


def before(ids: Tensor, positions: Tensor, model: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first layer's input [N, Q, d] and its RMSNorm, and cos and sin of RoPE [N, Q, D]."""
    x = model.embed_tokens(ids)
    cos, sin = model.rotary_emb(x, positions)
    return x, model.layers[0].input_layernorm(x), cos.contiguous(), sin.contiguous()


def add_norm(x: Tensor, y: Tensor, norm: Qwen3RMSNorm) -> tuple[Tensor, Tensor]:
    """x + y [..., d] and its norm; on CPU in plain PyTorch, the reference."""
    if x.is_cuda:
        from actors.sampler.kernels.layers import add_norm_triton  # needs triton

        return add_norm_triton(x, y, norm.weight, norm.variance_epsilon)
    x = x + y
    return x, norm(x)


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU of the first half of [..., 2 f] times the second half: [..., f]; on CPU in plain PyTorch, the reference."""
    if gate_up.is_cuda:
        from actors.sampler.kernels.layers import swiglu_triton  # needs triton

        return swiglu_triton(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def attention(module: Any, packed: Tensor, cos: Tensor, sin: Tensor, rows: CacheRows) -> Tensor:
    """The heads' outputs [N, Q, H, D] of a Qwen3Attention, from packed projections [N, Q, (H + 2 H_kv) D].

    Norms and RoPE of query and key heads, then attention over the slot cache; on CPU in plain PyTorch, the reference.
    """
    heads = packed.unflatten(2, (-1, module.head_dim)).transpose(1, 2)
    kv_heads = module.slot_keys.shape[1]
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    options = (rows, module.scaling, module.sliding_window)
    if packed.is_cuda:
        from actors.sampler.kernels.block_attention import Fusion, block_attention_triton  # needs triton

        fusion = Fusion(module.q_norm.weight, module.k_norm.weight, module.q_norm.variance_epsilon, cos, sin)
        return block_attention_triton(attention_inputs(module, query, key, value, *options), fusion)
    query, key = apply_rotary_pos_emb(module.q_norm(query), module.k_norm(key), cos, sin)
    return slot_attention(attention_inputs(module, query, key, value, *options))
