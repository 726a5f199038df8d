"""The DeepSpeed configuration of the learner: generated, with the user's keys merged over it."""

from __future__ import annotations

from typing import Any

from common.config.run import LearnerConfig

# weights that a rank keeps beside its shard: these need no gathering in every forward and backward
WHOLE_ELEMENTS = 1_000_000_000


def deepspeed_config(config: LearnerConfig, on_gpu: bool) -> dict[str, Any]:
    """ZeRO stage 3 with AdamW. Gradient accumulation is driven by the learner, so DeepSpeed sees one step each."""
    generated = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": WHOLE_ELEMENTS,  # of one parameter
            "stage3_model_persistence_threshold": WHOLE_ELEMENTS,  # of all, in the order of the model
        },
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.lr,
                "betas": list(config.betas),
                "eps": config.eps,
                "weight_decay": config.weight_decay,
                "torch_adam": True,  # DeepSpeed's own would be compiled at the first start
            },
        },
        "steps_per_print": 10**9,
    }
    merged = merge(generated, config.deepspeed)
    params = merged["optimizer"]["params"]
    if on_gpu and params.get("torch_adam"):
        params.setdefault("fused", True)  # torch's one kernel, instead of a dozen passes over the states
    return merged


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries merged key by key; `over` wins."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged
