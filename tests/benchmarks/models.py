"""Random models of known sizes, built on the device (benchmarks need shapes, not knowledge), and its two speeds."""

from __future__ import annotations

import math
import time
from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deploy.demo.tiny_arlm import build_tokenizer

SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 263},
    "mid": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 151936},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152},
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
}  # fmt: skip
_LLAMAS = ("135m",)  # SmolLM2's shape; all others are Qwen3


def random_model(size: str, device: str, **changes: int) -> PreTrainedModel:
    """A Qwen3 or Llama of one of SIZES, with changed entries; bfloat16 on CUDA, float32 on CPU."""
    torch.manual_seed(0)
    family = "llama" if size in _LLAMAS else "qwen3"
    shape = {**SIZES[size], **changes, "tie_word_embeddings": True, "max_position_embeddings": 8192}
    config = AutoConfig.for_model(family, **shape)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    made: PreTrainedModel = model.eval()
    return made


def save_random_model(size: str, device: str, folder: str) -> None:
    """With the tiny ARLM's tokenizer, as the processes of a run load it."""
    random_model(size, device).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    if device == "cuda":
        torch.cuda.empty_cache()


@cache
def matmul_rate(device: str = "cuda", seconds: float = 2.0) -> float:
    """FLOP/s of a large square product, bfloat16 on CUDA and float32 on one thread on CPU.

    On CUDA once it has run for so long: power, not the clock of a cold GPU, sets it. A GPU at rest reaches up to a
    fifth more for some milliseconds, and what follows depends on what came before.
    """
    if device == "cpu":
        return _cpu_matmul_rate()
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")

    def seconds_of(products: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(products):
            a @ a
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    seconds_of(3)
    products = math.ceil(10 * seconds / seconds_of(10))
    seconds_of(products)
    return products * 2 * 8192**3 / seconds_of(products)


def _cpu_matmul_rate() -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a, times = torch.randn(1024, 1024), []
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 2 * 1024**3 / min(times)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large device-to-device copy."""
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    for _ in range(3):
        b.copy_(a)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        b.copy_(a)
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * a.nbytes / (start.elapsed_time(end) / 1e3)
