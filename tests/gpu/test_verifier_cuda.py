"""The original as the verifier, under captured graphs.

Needs torch, transformers, pydantic, pyarrow and a CUDA device.
"""

import pytest
import torch

from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from common.config.unmasking import SpeculativeUnmasking
from common.student import load_model
from tests.models import tiny_qwen3
from tests.unit.test_verification import EOS, MASK, TOKENS, requests
from tests.unit.test_verifier import near

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("context", ["block", "causal"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_is_that_of_the_cpu(tmp_path, context, temperature):
    torch.backends.cuda.matmul.allow_tf32 = False
    path = tiny_qwen3(tmp_path, seed=2, hidden=128, heads=4, kv_heads=2)
    decoding, texts = Decoding(SpeculativeUnmasking(verify="base"), temperature), []
    for device in ("cpu", "cuda"):
        student, original = near(path, context), load_model(path, torch.float32, "sdpa").requires_grad_(False)
        of = Sampler(
            student.to(device), block_size=4, mask_token_id=MASK, eos_token_id=EOS, token_count=TOKENS, slots=8, seed=5,
            compiled=False, verifier=original.to(device),
        )  # fmt: skip
        for _ in range(3 if device == "cuda" else 1):  # from graphs in the end
            made = {t.ordinal: t.response_ids.tolist() for t in of.generate(requests(), decoding)}
        texts.append(made)
    # a tie within rounding may fall either way
    assert sum(texts[0][ordinal] == text for ordinal, text in texts[1].items()) >= len(texts[0]) - 1
