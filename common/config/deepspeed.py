"""Which keys of DeepSpeed's configuration a user may set: all but those that the learner's own fields decide."""

from __future__ import annotations

from typing import Any

from common.config.shown import shown

# key: the field that decides it
_DECIDED = {
    "train_batch_size": "learner.batch_rows",
    "train_micro_batch_size_per_gpu": "learner.max_tokens_per_microbatch",
    "gradient_accumulation_steps": "learner.batch_rows",
    "gradient_clipping": "learner.grad_clip",
    "bf16": "learner.dtype",
    "bfloat16": "learner.dtype",
    "fp16": "learner.dtype",
    "amp": "learner.dtype",
    "torch_autocast": "learner.dtype",
    "scheduler": "learner.lr_schedule",
    "optimizer.params.lr": "learner.lr",
    "optimizer.params.betas": "learner.betas",
    "optimizer.params.eps": "learner.eps",
    "optimizer.params.weight_decay": "learner.weight_decay",
}
_FIXED = {"zero_optimization.stage": 3, "optimizer.type": "AdamW"}  # what the learner is written for
_REFUSED = {
    "zero_optimization.offload_optimizer.device": ("nvme", "checkpoints need the optimizer's states in memory; use cpu")
}
_SECTIONS = ("zero_optimization", "zero_optimization.offload_optimizer", "optimizer", "optimizer.params")


def check_deepspeed(keys: dict[str, Any], prefix: str = "") -> None:
    """Refuse keys that would contradict the generated configuration (learner/deepspeed_config.py).

    Raises:
        ValueError: names the key, its value, and the field to set instead.
    """
    for name, value in keys.items():
        key = prefix + name
        if key in _DECIDED:
            raise ValueError(f"{key} ({shown(value)}) is decided by {_DECIDED[key]}; set that, and leave {key} out")
        if key in _FIXED and value != _FIXED[key]:
            raise ValueError(f"{key} ({shown(value)}) can only be {_FIXED[key]!r} here; leave it out")
        if key in _REFUSED and value == _REFUSED[key][0]:
            raise ValueError(f"{key} ({shown(value)}) is not supported: {_REFUSED[key][1]}")
        if key in _SECTIONS:
            if not isinstance(value, dict):
                raise ValueError(f"{key}: expected DeepSpeed's keys below it, found {shown(value)}")
            check_deepspeed(value, f"{key}.")
