"""The DeepSpeed configuration of the learner: generated, with the user's keys merged over it.

ZeRO stage 3 serves every size, so that there is one form of optimizer, publishing and checkpoints; stages 1 and 2 were
left out. What stage 3 costs a small model, gathering its weights in every pass, is saved by keeping models of up to a
billion parameters whole on each rank beside its shard (learner/whole_weights.py); of larger ones DeepSpeed keeps the
first billion whole. Offloading to the CPU is not generated; `learner.deepspeed` can add it.
"""

from __future__ import annotations

from typing import Any

from common.config.learner import LearnerConfig

# parameters that a rank keeps whole beside its shard: these are not gathered in every forward and backward
WHOLE_ELEMENTS = 1_000_000_000


def keeps_whole(config: LearnerConfig, parameters: int) -> bool:
    """Whether every rank holds a model of this size whole: it is small enough, and nothing of it is offloaded."""
    zero = config.deepspeed.get("zero_optimization", {})
    offloads = any(zero.get(key) for key in ("offload_optimizer", "offload_param"))
    return parameters <= zero.get("stage3_model_persistence_threshold", WHOLE_ELEMENTS) and not offloads


def deepspeed_config(config: LearnerConfig, on_gpu: bool, whole: bool = False) -> dict[str, Any]:
    """ZeRO stage 3 with AdamW. The learner accumulates gradients over micro-batches itself, so DeepSpeed counts 1.

    Args:
        whole: the ranks keep whole weights themselves, so that DeepSpeed keeps shards alone.
    """
    generated = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            # DeepSpeed's own linear layer asks for the number of each weight, so that every layer would compile anew
            "memory_efficient_linear": not (whole or (config.compile and on_gpu)),
            "reduce_bucket_size": 50_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": WHOLE_ELEMENTS,  # largest single parameter
            "stage3_model_persistence_threshold": WHOLE_ELEMENTS,  # of all together, in the model's order
        },
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.lr,
                "betas": list(config.betas),
                "eps": config.eps,
                "weight_decay": config.weight_decay,
                "torch_adam": True,  # DeepSpeed's own is compiled at the first start
            },
        },
        "steps_per_print": 10**9,
    }
    merged = merge(generated, config.deepspeed)
    if whole:
        merged["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_model_persistence_threshold": 0,
        }
    params = merged["optimizer"]["params"]
    if on_gpu and params.get("torch_adam"):
        params.setdefault("fused", True)  # one kernel instead of a dozen passes over the states
    return merged


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries merged key by key; `over` wins."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged
