"""Terms beside the divergence, as configuration (learner/terms.py computes them)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.section import Section


class ExtraTerms(Section):
    """Terms beside the divergence, each 0 (off) by default; all share its positions, weights and normalisation."""

    sharpening: float = Field(
        0.0, ge=0, description="times the student's entropy where its best token is the target's best (CAP)"
    )
    rank: float = Field(
        0.0,
        ge=0,
        description="times the mean, over pairs of masked positions of a block of which the rollout revealed one "
        "earlier, of max(0, H_earlier - H_later + rank_margin), H the student's entropy (TABOM)",
    )
    rank_margin: float = Field(0.0, ge=0, description="nats by which the earlier one's entropy should be lower")
    rank_window: int = Field(
        0,
        ge=0,
        description="rank what was revealed in so many rounds, from the earliest of the block's trained positions on; "
        "0: all of them",
    )
    alignment: float = Field(
        0.0, ge=0, description="times 1 - cosine of the student's and the teacher's final hidden states (REPR-ALIGN)"
    )
    alignment_of: Literal["final", "layers"] = Field(
        "final",
        description="what alignment compares; layers: all, or alignment_layers, made anew at the learner from a frozen "
        "copy of the ARLM, so that labels may be hard",
    )
    alignment_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="which layers: 0 is the embedding, the last the final hidden state; none: all"
    )
    alignment_weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="of these layers, in their order; none: all alike"
    )
    autoregressive: float = Field(
        0.0, ge=0, description="times the student's causal next-token cross-entropy on the clean response"
    )

    @property
    def aligns_layers(self) -> bool:
        """Whether more than the final hidden states of targets are aligned."""
        return self.alignment > 0 and self.alignment_of == "layers"

    def aligned(self, count: int) -> dict[int, float]:
        """The weights, which add up to 1, of the aligned ones of `count` layers, the embedding counted."""
        layers = self.alignment_layers or tuple(range(count))
        weights = self.alignment_weights or (1.0,) * len(layers)
        return {layer: weight / sum(weights) for layer, weight in zip(layers, weights, strict=True)}

    @model_validator(mode="after")
    def _each_layer_has_its_weight(self) -> ExtraTerms:
        layers, weights = self.alignment_layers, self.alignment_weights
        if layers and self.alignment_of != "layers":
            raise ValueError(f"alignment_layers {layers} is for alignment_of 'layers'; set that, or leave it out")
        if len(set(layers)) < len(layers):
            raise ValueError(f"alignment_layers {layers} names a layer twice; name each once")
        if weights and len(layers) != len(weights):
            raise ValueError(
                f"alignment_weights {weights} has not one weight for each of alignment_layers {layers}; list the "
                "layers, and a weight for each"
            )
        return self

    @property
    def needs_entropy(self) -> bool:
        return self.sharpening > 0 or self.rank > 0
