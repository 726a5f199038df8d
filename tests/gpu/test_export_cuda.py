"""An exported model on CUDA writes what it writes on CPU, and what the sampler writes.

Needs torch, transformers, pydantic, pyarrow and a CUDA device; neither ray, deepspeed nor vllm.
"""

import pytest
import torch
from transformers import Qwen3ForCausalLM

from deploy.export.block_diffusion import BlockDiffusion
from deploy.export.exported_folder import read_student
from tests.unit.test_export import ENDS, LIMIT, SEED, THRESHOLD, expected, prompt_of, student

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class BlockDiffusionQwen3(BlockDiffusion, Qwen3ForCausalLM):
    """As the code of an exported folder has it."""


@pytest.mark.parametrize("rule", ["static", "dynamic", "speculative"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_on_cuda_are_those_of_the_cpu_and_of_the_sampler(tmp_path, rule, temperature):
    torch.backends.cuda.matmul.allow_tf32 = False
    path = student(tmp_path, "qwen3", "causal")
    model = BlockDiffusionQwen3.from_pretrained(path)
    model.config.update(read_student(path).described())
    decoding = {"rule": rule, "temperature": temperature, "block_size": 4, "draft_rounds": 1, "eos_token_id": ENDS}
    asked = [decoding | {"prompt": prompt_of(length), "top_k": 0, "top_p": 1.0} for length in (3, 8, 17)]
    found = []
    for device in ("cpu", "cuda"):
        made = []
        for one in asked:
            prompt = torch.tensor([one["prompt"]], device=device)
            options = {name: value for name, value in one.items() if name != "prompt"}
            out = model.to(device).generate(prompt, max_new_tokens=LIMIT, threshold=THRESHOLD, seed=SEED, **options)
            made.append(out[0, prompt.shape[1] :].tolist())
        found.append(made)
    assert found[0] == found[1] == expected(path, asked)


def test_it_generates_in_bfloat16(tmp_path):
    path = student(tmp_path, "qwen3", "block")
    model = BlockDiffusionQwen3.from_pretrained(path, dtype=torch.bfloat16).to("cuda")
    model.config.update(read_student(path).described())
    made = model.generate(torch.tensor([prompt_of(9)], device="cuda"), max_new_tokens=LIMIT)
    assert made.shape[1] <= 9 + LIMIT and model.config.mask_token_id not in made[0, 9:].tolist()
