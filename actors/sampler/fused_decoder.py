"""The forward of a decoding pass, in fewer kernels than transformers' own: one for all supported families.

A layer is eight kernels: four products, attention (which also norms and rotates the heads), the gated activation, and
twice a residual sum together with the norms around it, of which the last is the next layer's. After the attention of
the last layer only the wanted positions are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from actors.sampler.attention import slot_attention
from actors.sampler.cache import CacheRows, attention_inputs
from actors.sampler.projections import PACKS, PackedLinear
from common.lora import gate_of
from common.student import attention_windows, layer_kinds


@dataclass(frozen=True)
class Family:
    """What the forward of a family has beyond Llama's; biases are a matter of the packed projections."""

    head_norms: bool = False  # of query and key heads, before RoPE
    centred_norms: bool = False  # x / rms(x) is multiplied by 1 + weight, in float32, and not by weight once rounded
    post_norms: bool = False  # the outputs of attention and MLP are normed before they are added to the residual
    rope_by_kind: bool = False  # sliding and full attention rotate by different angles


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(head_norms=True),
    "gemma3_text": Family(head_norms=True, centred_norms=True, post_norms=True, rope_by_kind=True),
}
TANH_GELU = {"silu": False, "gelu_pytorch_tanh": True}  # the gate's activation, by its name in transformers


class NormRule(NamedTuple):
    """How all RMSNorms of a model are computed."""

    epsilon: float
    centred: bool  # see Family


class FusedDecoder:
    """Reads the model's own parameters, so new weights may be copied into them, and the cache attached to it."""

    def __init__(self, model: PreTrainedModel, compiled: bool) -> None:
        """`misfit` must be None for the model."""
        config = model.config
        self.model: Any = model.model
        self.gate = gate_of(model)
        self.family = FAMILIES[config.model_type]
        self.norm_rule = NormRule(config.rms_norm_eps, self.family.centred_norms)
        self.tanh_gelu = TANH_GELU[_activation(config)]
        self.kinds, self.windows = layer_kinds(config), attention_windows(config)
        self._before = torch.compile(before, dynamic=True) if compiled else before

    @staticmethod
    def misfit(model: PreTrainedModel) -> str | None:
        """Why this forward cannot compute the model, whose projections must be packed before; None: it can."""
        config = model.config
        if config.model_type not in FAMILIES:
            return f"model_type {config.model_type!r} is not one of {', '.join(FAMILIES)}"
        if _activation(config) not in TANH_GELU:
            return f"its activation {_activation(config)!r} is not one of {', '.join(TANH_GELU)}"
        for layer in model.model.layers:
            for part, names in PACKS:
                if not all(isinstance(getattr(getattr(layer, part), name), PackedLinear) for name in names):
                    return f"the projections of its {part} are not plain linear layers"
        return None

    def __call__(
        self, ids: Tensor, positions: Tensor, rows: CacheRows, wanted: Tensor, masked: Tensor | None = None
    ) -> Tensor:
        """Final hidden states [W, d] at `wanted` int64 [W], indices into the flattened ids [N, Q]; gated adapters act
        where bool `masked` [N, Q] says."""
        if self.gate:
            self.gate.masked = None if masked is None else masked[..., None]
        layers, rule = list(self.model.layers), self.norm_rule
        next_norms = [*(layer.input_layernorm for layer in layers[1:]), self.model.norm]
        rope_kinds = tuple(sorted(set(self.kinds))) if self.family.rope_by_kind else ()
        x, inner, ropes = self._before(ids, positions, self.model, rope_kinds)
        for layer, next_norm, kind in zip(layers, next_norms, self.kinds, strict=True):
            module, rope = layer.self_attn, ropes[kind if self.family.rope_by_kind else ""]
            head_norms = (module.q_norm, module.k_norm) if self.family.head_norms else None
            packed = module.q_proj.product.of(inner)
            heads = attention(module, packed, head_norms, rule, rope, rows, self.windows[kind])
            if layer is layers[-1]:
                x, heads = x.flatten(0, 1)[wanted], heads.flatten(0, 1)[wanted]
                if self.gate and self.gate.masked is not None:
                    self.gate.masked = self.gate.masked.flatten(0, 1)[wanted]
            if self.family.post_norms:
                after_attention, before_mlp = layer.post_attention_layernorm, layer.pre_feedforward_layernorm
                after_mlp = layer.post_feedforward_layernorm
            else:
                after_attention, before_mlp, after_mlp = None, layer.post_attention_layernorm, None
            x, inner = add_norm(x, module.o_proj(heads.flatten(-2)), before_mlp, rule, after_attention)
            gated = gate(layer.mlp.gate_proj.product.of(inner), self.tanh_gelu)
            x, inner = add_norm(x, layer.mlp.down_proj(gated), next_norm, rule, after_mlp)
        if self.gate:
            self.gate.masked = None
        return inner


def before(
    ids: Tensor, positions: Tensor, model: Any, rope_kinds: tuple[str, ...]
) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The first layer's input [N, Q, d] and its RMSNorm, and cos and sin of RoPE [N, Q, D], by kind of layer where
    `rope_kinds` are given, else once, under the empty name."""
    x = model.embed_tokens(ids)
    ropes = {}
    for kind in rope_kinds or ("",):
        cos, sin = model.rotary_emb(x, positions, kind) if kind else model.rotary_emb(x, positions)
        ropes[kind] = cos.contiguous(), sin.contiguous()
    return x, model.layers[0].input_layernorm(x), ropes


def add_norm(x: Tensor, y: Tensor, norm: Any, rule: NormRule, post_norm: Any = None) -> tuple[Tensor, Tensor]:
    """x + y [..., d], y normed by `post_norm` before where there is one, and the `norm` of the sum; on CPU in plain
    PyTorch, the reference."""
    if in_kernels(x):
        from actors.sampler.kernels.layers import add_norm_triton  # needs triton

        return add_norm_triton(x, y, norm.weight, *rule, post_norm.weight if post_norm else None)
    x = x + (post_norm(y) if post_norm else y)
    return x, norm(x)


def gate(gate_up: Tensor, tanh_gelu: bool) -> Tensor:
    """SiLU, or GELU in its tanh form, of the first half of [..., 2 f] times the second half: [..., f]; on CPU in plain
    PyTorch, the reference."""
    if in_kernels(gate_up):
        from actors.sampler.kernels.layers import gate_triton  # needs triton

        return gate_triton(gate_up, tanh_gelu)
    gates, up = gate_up.chunk(2, dim=-1)
    return (gelu(gates, approximate="tanh") if tanh_gelu else silu(gates)) * up


def attention(
    module: Any,
    packed: Tensor,
    head_norms: tuple[Any, Any] | None,
    rule: NormRule,
    rope: tuple[Tensor, Tensor],
    rows: CacheRows,
    window: int | None,
) -> Tensor:
    """The heads' outputs [N, Q, H, D] of an attention module, from packed projections [N, Q, (H + 2 H_kv) D].

    Norms of query and key heads where there are some, RoPE by cos and sin [N, Q, D], then attention over the slot
    cache; on CPU in plain PyTorch, the reference.
    """
    heads = packed.unflatten(2, (-1, module.head_dim)).transpose(1, 2)
    kv_heads = module.slot_keys.shape[1]
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    options = (rows, module.scaling, window)
    if in_kernels(packed):
        from actors.sampler.kernels.block_attention import Fusion, block_attention_triton  # needs triton

        weights = (head_norms[0].weight, head_norms[1].weight) if head_norms else None
        fusion = Fusion(*rope, weights, *rule)
        return block_attention_triton(attention_inputs(module, query, key, value, *options), fusion)
    if head_norms:
        query, key = head_norms[0](query), head_norms[1](key)
    query, key = apply_rotary_pos_emb(query, key, *rope)
    return slot_attention(attention_inputs(module, query, key, value, *options))


def in_kernels(x: Tensor) -> bool:
    """Whether Triton kernels compute what follows from `x`, and not their references."""
    return x.is_cuda


def _activation(config: Any) -> str:
    return config.hidden_activation if config.model_type == "gemma3_text" else config.hidden_act
