"""The format `hf`: a folder that transformers loads with trust_remote_code, and whose `generate` is block diffusion.

The folder has two files of code. `block_diffusion.py` decodes, and is the same for every family. `modeling_opdlm.py`,
which is written here, puts it before the family's own class of transformers.
"""

from __future__ import annotations

from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deploy.export.exported_folder import Student, save_weights, write_config

_MODELING = '''"""A {family} whose `generate` decodes by block diffusion; {origin}."""

from transformers import {config}, {model}

from .block_diffusion import BlockDiffusion


class OpdlmConfig({config}):
    model_type = "{model_type}"


class OpdlmForCausalLM(BlockDiffusion, {model}):
    config_class = OpdlmConfig
'''


def write_hf(student: Student, out: Path) -> None:
    """Weights, config and code in `out`."""
    family = student.config.model_type
    model_type = f"opdlm_{family}"
    code = _MODELING.format(
        family=family,
        origin=student.origin,
        config=CONFIG_MAPPING_NAMES[family],
        model=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family],
        model_type=model_type,
    )
    (out / "modeling_opdlm.py").write_text(code, encoding="utf-8")
    save_weights(student, out)
    write_config(
        student.values
        | student.described()
        | {
            "model_type": model_type,
            "architectures": ["OpdlmForCausalLM"],
            "auto_map": {
                "AutoConfig": "modeling_opdlm.OpdlmConfig",
                "AutoModelForCausalLM": "modeling_opdlm.OpdlmForCausalLM",
            },
        },
        out,
    )
