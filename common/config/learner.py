"""The learner's section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from common.config.deepspeed import check_deepspeed
from common.config.resources import Resources
from common.config.section import OPERATION, Section, plain_values
from common.config.values import MOST_PROCESSES, Dtype

Beta = Annotated[float, Field(ge=0, lt=1)]


class LearnerConfig(Section):
    """The DeepSpeed ZeRO-3 learner."""

    ranks: int = Field(2, ge=1, le=MOST_PROCESSES, description="processes in the ZeRO world")
    batch_rows: int = Field(8, ge=1, description="trajectories per optimiser update, over all ranks")
    max_tokens_per_microbatch: int = Field(
        16384,
        ge=8,
        description="token budget of one packed forward on one rank, clean and noised copies counted",
        json_schema_extra=OPERATION,
    )
    lr: float = Field(1e-5, gt=0, le=1, description="AdamW learning rate after warm-up")
    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end of the cosine or of the decay")
    lr_schedule: Literal["cosine", "constant", "wsd"] = Field(
        "cosine", description="after the warm-up; wsd: constant, then a linear decay over the last decay_share"
    )
    decay_share: float = Field(0.2, gt=0, le=1, description="share of all updates that wsd decays over")
    warmup_batches: int = Field(5, ge=0, description="rollout batches of linear warm-up")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of AdamW")
    eps: float = Field(1e-8, gt=0, le=1, description="of AdamW")
    weight_decay: float = Field(0.0, ge=0, le=10, description="of AdamW")
    grad_clip: float = Field(1.0, ge=0, description="global gradient norm; 0: off")
    dtype: Dtype = Field("bfloat16", description="of the forward; bfloat16 keeps float32 master weights")
    logits_chunk_rows: int = Field(
        1024, ge=1, description="masked positions per chunk of the LM head and the loss", json_schema_extra=OPERATION
    )
    freeze_embeddings: bool = Field(False, description="leave the embeddings and the LM head as they are (REPR-ALIGN)")
    gradient_checkpointing: bool = Field(
        True, description="recompute activations: less memory, a third more work", json_schema_extra=OPERATION
    )
    compile: bool = Field(
        False,
        description="on GPUs, compile the decoder layers: a third of the time for small models, half a minute at first",
        json_schema_extra=OPERATION,
    )
    liger_kernels: bool = Field(
        False,
        description="Liger's fused RMSNorm, RoPE and SwiGLU, on GPUs: a quarter less time and activation memory",
        json_schema_extra=OPERATION,
    )
    nonfinite_updates: int = Field(
        0,
        ge=0,
        description="updates that may be left out since their loss or gradient is not finite; one more ends the run, "
        "with a checkpoint",
        json_schema_extra=OPERATION,
    )
    deepspeed: dict[str, Any] = Field(
        {},
        description="DeepSpeed keys merged over the generated ones, e.g. zero_optimization.offload_optimizer; those "
        "that the learner's own fields decide are refused",
    )
    resources: Resources = Field(Resources(), json_schema_extra=OPERATION)

    @field_validator("deepspeed")
    @classmethod
    def _deepspeed_is_ours_to_set(cls, keys: dict[str, Any]) -> dict[str, Any]:
        keys = plain_values(keys)
        check_deepspeed(keys)
        return keys

    @model_validator(mode="after")
    def _rows_cover_ranks(self) -> LearnerConfig:
        if self.batch_rows < self.ranks:
            raise ValueError(
                f"batch_rows ({self.batch_rows}) is below ranks ({self.ranks}): a rank would have no row; "
                "raise batch_rows or lower ranks"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) is above lr ({self.lr}); lower min_lr")
        if self.freeze_embeddings and self.weight_decay:
            raise ValueError(
                f"weight_decay ({self.weight_decay:g}) would shrink what freeze_embeddings freezes; set weight_decay "
                "to 0 or freeze_embeddings to false"
            )
        if self.liger_kernels and not self.resources.gpus:
            raise ValueError("liger_kernels need a GPU; set learner.resources.gpus to 1 or liger_kernels to false")
        if self.liger_kernels and self.compile:
            raise ValueError("compile and liger_kernels do the same work; set one of them to false")
        return self
