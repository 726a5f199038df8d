"""The format `sdar`: the architecture of SDAR (Cheng et al., 2025, arXiv 2510.06303), which engines for block diffusion
load: SGLang, LMDeploy and JetEngine.

It is Qwen3's, decoded on the absolute grid with block-causal attention. What the engines take from the folder, and what
must be told to them, is in docs/export.md.
"""

from __future__ import annotations

from pathlib import Path

from common.model_files import ModelError
from common.student import attention_context, layer_kinds
from deploy.export.exported_folder import Student, save_weights, write_config

FIXED_MASK_ID = 151669  # SGLang and LMDeploy take this id for the mask, whatever the config says

_CONFIGURATION = '''"""The config of a {origin}."""

from transformers import Qwen3Config


class SDARConfig(Qwen3Config):
    """Qwen3's, which in transformers 5 has no `rope_theta` any more: engines read it, and would take a default."""

    model_type = "sdar"

    def __init__(self, **values):
        super().__init__(**values)
        self.rope_theta = self.rope_parameters["rope_theta"]
'''

_MODELING = '''"""An SDAR whose `generate` decodes by block diffusion; {origin}."""

from transformers import Qwen3ForCausalLM

from .block_diffusion import BlockDiffusion
from .configuration_sdar import SDARConfig


class SDARForCausalLM(BlockDiffusion, Qwen3ForCausalLM):
    config_class = SDARConfig
'''


def check_sdar(student: Student) -> None:
    """Refuse a model that is no Qwen3 as SDAR's engines compute it.

    Raises:
        ModelError: names the first difference.
    """
    config = student.config
    if config.model_type != "qwen3":
        raise ModelError(
            f"cannot be exported as an SDAR: it has model_type {config.model_type!r}, and an SDAR is a Qwen3, with "
            "norms of queries and keys; use --format hf"
        )
    rope_type = config.rope_parameters["rope_type"]
    reasons = {
        "attention_context 'causal', and the engines let a finished block see its end; train with attention.context "
        "block": attention_context(config) != "block",
        "layers with a sliding window, which the engines do not have": "sliding_attention" in layer_kinds(config),
        f"rope_type {rope_type!r}, which each engine reads in its own way; set it to 'default'": rope_type != "default",
        f"hidden_act {config.hidden_act!r}, and the engines compute silu": config.hidden_act != "silu",
    }
    for reason, holds in reasons.items():
        if holds:
            raise ModelError(f"cannot be exported as an SDAR: it has {reason}")


def write_sdar(student: Student, out: Path) -> None:
    """Weights with an LM head of their own, config and code in `out`."""
    for name, code in (("configuration_sdar.py", _CONFIGURATION), ("modeling_sdar.py", _MODELING)):
        (out / name).write_text(code.format(origin=student.origin), encoding="utf-8")
    save_weights(student, out, untied=True)
    rope = dict(student.config.rope_parameters)
    write_config(
        student.values
        | student.described()
        | {
            "model_type": "sdar",
            "architectures": ["SDARForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_sdar.SDARConfig",
                "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
            },
            "rope_parameters": rope,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "head_dim": student.config.head_dim,
            "eos_token_id": list(student.end_tokens),
            "sliding_window": None,
            "use_sliding_window": False,
            "torch_dtype": str(student.config.dtype or "float32").removeprefix("torch."),
        },
        out,
    )


def sdar_notes(student: Student) -> list[str]:
    """What somebody should know who loads the folder."""
    size, mask = student.config.block_size, student.config.mask_token_id
    notes = []
    if mask != FIXED_MASK_ID:
        notes.append(
            f"SGLang and LMDeploy take token {FIXED_MASK_ID} for the mask, and this model's is {mask}: they would "
            "decode it wrongly; transformers does not, nor JetEngine with mask_token_id"
        )
    if size != 4:
        notes.append(f"the engines decode in blocks of 4 unless they are told: block_size or dllm_block_length {size}")
    return notes
