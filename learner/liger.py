"""Liger's fused Triton kernels for RMSNorm, RoPE and SwiGLU, the operations between the matrix products."""

from __future__ import annotations

from transformers import PreTrainedModel


def use_liger_kernels(model: PreTrainedModel) -> None:
    """Patch `model` in place. Liger's losses are not used: the objective is this project's own.

    Raises:
        ModuleNotFoundError: liger-kernel is not installed (it is in the `cuda` extra).
        ValueError: Liger has no kernels for the model's family.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if patch is None:
        raise ValueError(
            f"Liger has no kernels for model_type {model.config.model_type!r}; set learner.liger_kernels to false"
        )
    patch(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
