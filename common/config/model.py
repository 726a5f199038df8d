"""The model that is converted, and what its tokens see."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

from pydantic import Field

from common.config.paths import InputPath
from common.config.section import OPERATION, Section

AttentionContext = Literal["block", "causal"]


class ModelShape(Section):
    """Sizes of a model whose files are not on this disk, for the estimates of `--dry-run`."""

    hidden_size: int = Field(gt=0, le=10**6, description="width of the residual stream")
    layers: int = Field(gt=0, le=10**4, description="decoder layers")
    heads: int = Field(gt=0, le=10**5, description="query heads")
    kv_heads: int = Field(gt=0, le=10**5, description="key and value heads")
    head_dim: int = Field(gt=0, le=10**5, description="width of one head")
    intermediate_size: int = Field(gt=0, le=10**7, description="width of the MLP")
    vocab_size: int = Field(gt=0, le=10**8, description="embedding rows")
    tied_embeddings: bool = Field(True, description="the LM head is the embedding")
    experts: int = Field(0, ge=0, le=10**5, description="experts of each layer; 0: a plain MLP")
    experts_per_token: int = Field(0, ge=0, le=10**5, description="of these, for one token")
    expert_size: int = Field(0, ge=0, le=10**7, description="width of one expert")

    @property
    def parameters(self) -> int:
        """Number of parameters of a Qwen3-like decoder of this shape (norm weights left out)."""
        return self._parameters(self.experts)

    @property
    def active_parameters(self) -> int:
        """Those that work on one token."""
        return self._parameters(self.experts_per_token)

    def _parameters(self, experts: int) -> int:
        attention = self.hidden_size * self.head_dim * 2 * (self.heads + self.kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        if self.experts:
            mlp = self.hidden_size * (3 * experts * self.expert_size + self.experts)  # and the router
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.layers * (attention + mlp) + embeddings

    def adapter_parameters(self, rank: int, targets: Collection[str]) -> int:
        """Number of parameters of LoRA's A and B of the target layers."""
        return self.layers * rank * sum(sum(self._widths(target)) for target in targets)

    def targeted_parameters(self, targets: Collection[str]) -> int:
        """Number of parameters of these layers themselves."""
        return self.layers * sum(math.prod(self._widths(target)) for target in targets)

    def _widths(self, target: str) -> tuple[int, int]:
        """Of the input and the output of a linear layer."""
        heads, kv_heads = self.heads * self.head_dim, self.kv_heads * self.head_dim
        widths = {
            "q_proj": (self.hidden_size, heads),
            "o_proj": (heads, self.hidden_size),
            "k_proj": (self.hidden_size, kv_heads),
            "v_proj": (self.hidden_size, kv_heads),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }
        return widths.get(target, (self.hidden_size, self.intermediate_size))

    @property
    def kv_elements_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim


class ModelConfig(Section):
    """The ARLM from which the student starts."""

    path: InputPath = Field(description="folder of a Hugging Face causal LM, its hub id, or a .gguf file")
    mask_token: str = Field(
        "auto",
        min_length=1,
        description="auto: the tokenizer's own, else one in a spare embedding row, else a token that is reserved or "
        "never occurs; new: a row is added; or a token, which exists or gets a spare row",
    )
    end_tokens: list[str] | None = Field(
        None,
        min_length=1,
        description="tokens that end a response, the one that ends a turn first; default: those of tokenizer, "
        "generation config and chat template together",
    )
    shape: ModelShape | None = Field(
        None, description="sizes for --dry-run where the model is not on this disk", json_schema_extra=OPERATION
    )


class AttentionConfig(Section):
    """What clean tokens see; noised ones see all clean tokens of earlier blocks, and their own block."""

    context: AttentionContext = Field(
        "block",
        description="block: clean tokens see their own block and all before it; causal: as in the ARLM, only what "
        "stands before them, so that one pass over clean tokens commits and verifies them (NBDiff)",
    )
