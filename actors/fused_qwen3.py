"""The forward of a decoding pass of Qwen3, by fewer kernels than transformers' own.

Between two attentions stand four products and what is between them, across the layers' border: one function that is
compiled once and serves all layers. Norms and RoPE of the heads are in the attention kernel. The last layer goes on
after its attention at the wanted positions only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, apply_rotary_pos_emb

from actors.attention import EVERYTHING, slot_attention
from actors.cache import CacheRows
from actors.projections import PackedLinear


class LayerStart(NamedTuple):
    """Weights up to a layer's attention."""

    norm: Tensor  # [d]
    packed: Tensor  # [(H + 2 H_kv) D, d], query, key and value


class LayerEnd(NamedTuple):
    """Weights behind it."""

    out: Tensor  # [d, H D]
    norm: Tensor  # [d]
    gate_up: Tensor  # [2 f, d]
    down: Tensor  # [d, f]


class FusedQwen3:
    """Reads the model's own parameters, wherever new weights are copied into them, and the cache attached to it."""

    def __init__(self, model: PreTrainedModel, compiled: bool) -> None:
        """The model must be what `fits` asks for."""
        self.model: Any = model.model
        self.epsilon = model.config.rms_norm_eps
        layers = self.model.layers
        self.starts = [LayerStart(x.input_layernorm.weight, x.self_attn.q_proj.product.weight) for x in layers]
        self.ends = [_end(layer) for layer in layers]
        parts: list[Callable[..., Any]] = [before, between, after]
        self._parts = [torch.compile(part, dynamic=True) for part in parts] if compiled else parts

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether the model is what this forward computes; its projections must be packed already."""
        return (
            type(model) is Qwen3ForCausalLM
            and isinstance(model.model.layers[0].self_attn.q_proj, PackedLinear)
            and not model.config.attention_bias
            and model.config.hidden_act == "silu"
        )

    def __call__(self, ids: Tensor, positions: Tensor, rows: CacheRows, wanted: Tensor) -> Tensor:
        """Final hidden states [len(wanted), d] at `wanted` int64, places in the flattened ids [N, Q]."""
        first, middle, last = self._parts
        attentions = [layer.self_attn for layer in self.model.layers]
        x, cos, sin, packed = first(ids, positions, self.model, self.starts[0], self.epsilon)
        for module, end, start in zip(attentions, self.ends, self.starts[1:], strict=False):
            heads = attention(module, packed, cos, sin, rows)
            x, packed = middle(x, heads, end, start, self.epsilon)
        heads = attention(attentions[-1], packed, cos, sin, rows)
        x, heads = x.flatten(0, 1)[wanted], heads.flatten(0, 1)[wanted]
        return last(x, heads, self.ends[-1], self.model.norm.weight, self.epsilon)


def before(
    ids: Tensor, positions: Tensor, model: Any, start: LayerStart, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first layer's input [N, Q, d], the angles of RoPE (cos and sin [N, Q, D]), and the first projections."""
    x = model.embed_tokens(ids)
    cos, sin = model.rotary_emb(x, positions)
    return x, cos.contiguous(), sin.contiguous(), linear(normed(x, start.norm, epsilon), start.packed)


def between(x: Tensor, heads: Tensor, end: LayerEnd, start: LayerStart, epsilon: float) -> tuple[Tensor, Tensor]:
    """From a layer's input x [..., d] and what its heads attended to [..., H, D], to the next layer's input and
    projections."""
    x = _finished(x, heads, end, epsilon)
    return x, linear(normed(x, start.norm, epsilon), start.packed)


def after(x: Tensor, heads: Tensor, end: LayerEnd, norm: Tensor, epsilon: float) -> Tensor:
    """The same of the last layer, to the final hidden states."""
    return normed(_finished(x, heads, end, epsilon), norm, epsilon)


def _finished(x: Tensor, heads: Tensor, end: LayerEnd, epsilon: float) -> Tensor:
    x = x + linear(heads.flatten(-2), end.out)
    gate, up = linear(normed(x, end.norm, epsilon), end.gate_up).chunk(2, dim=-1)
    return x + linear(silu(gate) * up, end.down)


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm, rounded where Qwen3RMSNorm rounds."""
    precise = x.float()
    precise = precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + epsilon)
    return weight * precise.to(x.dtype)


def _end(layer: Any) -> LayerEnd:
    mlp = layer.mlp
    products = mlp.gate_proj.product.weight, mlp.down_proj.weight
    return LayerEnd(layer.self_attn.o_proj.weight, layer.post_attention_layernorm.weight, *products)


def attention(module: Any, packed: Tensor, cos: Tensor, sin: Tensor, rows: CacheRows) -> Tensor:
    """What the heads of a Qwen3Attention attend to [N, Q, H, D], from packed projections [N, Q, (H + 2 H_kv) D].

    Norms and RoPE of query and key heads, then attention over the slot cache; on CPU the plain way, the reference.
    """
    heads = packed.unflatten(2, (-1, module.head_dim)).transpose(1, 2)
    kv_heads = module.slot_keys.shape[1]
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    memory = (module.slot_keys, module.slot_values, rows.slots, rows.positions, rows.block_size, module.scaling)
    window = module.sliding_window or EVERYTHING
    weights, epsilon = (module.q_norm.weight, module.k_norm.weight), module.q_norm.variance_epsilon
    if packed.is_cuda:
        assert rows.partner is not None  # a decoding pass has partners
        from actors.block_attention_kernels import Fusion, block_attention_triton  # needs triton

        fusion = Fusion(*weights, epsilon, cos, sin)
        return block_attention_triton(query, key, value, *memory, window, rows.partner, fusion)
    query, key = (normed(x, weight, epsilon) for x, weight in zip((query, key), weights, strict=True))
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    return slot_attention(query, key, value, *memory, window, rows.partner)
