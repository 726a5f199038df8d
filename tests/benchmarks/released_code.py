"""Runs the sampler and the trainer of OPDLM's released code from a checkout of it, in a process for nothing else.

Nothing of the checkout is changed. What a machine lacks is replaced, and `replaced` in the results names it:

| missing | in its place |
| --- | --- |
| flash_attn | the checkout's own Triton kernel of the same paged attention; new keys are written by indexing |
| liger_kernel | SiLU times gate, inside the same compiled function |
| omegaconf, wandb, torchvision | nothing: they read files, log and load images, outside of what is timed |

Its engine launches every kernel from the host, eagerly, so the first changes its time little.

Its class for models of another family (`models/sdar`) is never imported: it wants transformers 4.52. Checkpoints, which
its trainer writes after every rollout batch, are not written.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel  # noqa: F401 (before anything is put in a package's place)

from deploy.dashboard.process import free_port

BLOCK = 4
_REPEATS = 3
_WARM_UP_TOKENS = 16


def sample(reference: str, folder: str, sequences: int, prompt: int, new_tokens: int) -> dict[str, Any]:
    """Tokens per second of its engine at one token a step, end tokens ignored; CUDA only, as the engine is.

    `folder` holds a Qwen3 with a tokenizer that has a mask token and a padding token.
    """
    replaced = _stand_ins("flash_attn", "liger_kernel")
    sys.path.insert(0, str(Path(reference) / "sample"))
    from jetengine_ext import config as engine_config  # type: ignore[import-not-found]

    engine_config.AutoConfig = SimpleNamespace(from_pretrained=_engine_config)
    from jetengine_ext.llm import LLM  # type: ignore[import-not-found]
    from jetengine_ext.sampling_params import SamplingParams  # type: ignore[import-not-found]

    # eager and with these settings, as its rollouts make it
    engine = LLM(folder, enforce_eager=True, mask_token_id=0, block_length=BLOCK, gpu_memory_utilization=0.8)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 200, size=prompt + i % BLOCK).tolist() for i in range(sequences)]
    times = []
    for tokens in (_WARM_UP_TOKENS, new_tokens):
        asked = SamplingParams(
            temperature=1.0, max_tokens=tokens, ignore_eos=True, block_length=BLOCK, denoising_steps=BLOCK,
            remasking_strategy="low_confidence_static",
        )  # fmt: skip
        start = time.perf_counter()
        made = engine.generate_streaming(prompts, asked, max_active=sequences, use_tqdm=False)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    count = sum(len(one["token_ids"]) for one in made)
    return {"seconds": times[-1], "tokens": count, "tokens_per_second": count / times[-1], "replaced": replaced}


def update(
    reference: str, student: str, teacher: str, device: str, rows: int, prompt: int, response: int, offload: str,
    whole: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of one optimizer batch of `rows` rows, teacher's forwards included: the median of three after one more;
    and `whole_seconds` of a rollout batch of `whole` rows in such optimizer batches, where that is not 0.

    `offload`: where optimizer states and sharded weights are kept, `cpu` as released, or `none`. Rows are of equal
    length, one state for each block. Reading the rows and making masks count, as once for every rollout batch.
    """
    replaced = _stand_ins("omegaconf", "torchvision", "wandb")
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port("127.0.0.1", 0)), "ACCELERATE_USE_DEEPSPEED": "true",
    }  # fmt: skip
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    root = Path(reference)
    sys.path[:0] = [str(root), str(root / "train")]
    sys.modules["models"] = _module("models", SDARForCausalLM=None, __path__=[str(root / "models")])
    import rl_sdar  # type: ignore[import-not-found]

    rl_sdar.OmegaConf = SimpleNamespace(save=lambda *_: None)
    rl_sdar.save_checkpoint = lambda *_, **__: None
    config = _trainer_config(root, student, teacher, rows, response, offload)
    project = Path(config["experiment"]["project"])
    state = rl_sdar.init_training(config)

    def seconds(count: int) -> float:
        _write_rows(project, teacher, count, prompt, response)
        start = time.perf_counter()
        rl_sdar.train_one_step(state, config)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times = [seconds(rows) for _ in range(1 + _REPEATS)]
    row = {"seconds": median(times[1:]), "rows": rows, "tokens": rows * (prompt + 2 * response), "replaced": replaced}
    if device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row | ({"whole_seconds": seconds(whole)} if whole else {})


class _Fields(dict[str, Any]):
    """A section of its configuration, whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    @staticmethod
    def of(content: Any) -> Any:
        if isinstance(content, dict):
            return _Fields({name: _Fields.of(value) for name, value in content.items()})
        return content


def _trainer_config(root: Path, student: str, teacher: str, rows: int, response: int, offload: str) -> _Fields:
    """Its configuration file, with what its launchers for Qwen3-0.6B set for one GPU."""
    config = _Fields.of(yaml.safe_load((root / "configs" / "rl_bd3lm.yaml").read_text()))
    config.wandb.update(enabled=False)
    config.experiment.update(project=str(Path(student).parent / "released"), total_step=100, save_every=1000)
    config.model.update(pretrained_model=student, teacher_model=teacher)
    config.training.update(
        batch_size_lm=1, gradient_accumulation_steps=rows, one_state_per_block=True, max_gen_length=response,
        offload_optimizer_device=offload, offload_param_device=offload,
    )  # fmt: skip
    config.optimizer.params.update(learning_rate=1e-5, epsilon=1e-8)
    config.lr_scheduler.params.update(learning_rate=1e-5)
    made: _Fields = config
    return made


def _write_rows(project: Path, tokenizer_folder: str, rows: int, prompt: int, response: int) -> None:
    """Texts of exactly so many tokens, and for each response the round in which every token was revealed."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rng = np.random.default_rng(0)
    word = " a"
    assert len(tokenizer(word * 7).input_ids) == 7, "the tokenizer has no token for a short word"
    order = np.concatenate([i * BLOCK + rng.permutation(BLOCK) for i in range(response // BLOCK)]).tolist()
    row = {"prompt": word * prompt, "response": word * response, "reward": 0.0, "step_map": order}
    (project / "temp_data").mkdir(parents=True, exist_ok=True)
    (project / "temp_data" / "rl_data.json").write_text(json.dumps([row] * rows))


def _engine_config(folder: str, **_: Any) -> Any:
    """The fields that its engine reads, as transformers 4 named them."""
    content = json.loads((Path(folder) / "config.json").read_text())
    return SimpleNamespace(**content | {"torch_dtype": torch.bfloat16, "rope_theta": 1e6, "rope_scaling": None})


def _stand_ins(*packages: str) -> list[str]:
    """Puts something in the place of each of these that is not installed; their names."""
    missing = [package for package in packages if find_spec(package) is None]
    for package in missing:
        for name, attributes in _MODULES[package].items():
            sys.modules[name] = _module(name, **attributes)
    return missing


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # transformers and accelerate look for it
    vars(module).update(attributes)
    return module


class _GatedActivation:
    @staticmethod
    def apply(gate: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate) * up


def _paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, block_table: Tensor,
    causal: bool,
) -> Tensor:  # fmt: skip
    """flash_attn's attention of new positions to a paged cache and to each other; they are written into the cache.

    q [sequences, new, heads, width], k and v with fewer heads, caches [pages, page length, heads, width].
    """
    from jetengine_ext.kernels.triton.attention.fused_page_attention_v6 import (  # type: ignore[import-not-found]
        fused_kv_cache_attention,
    )

    assert not causal
    new, page = q.shape[1], k_cache.shape[1]
    positions = cache_seqlens[:, None] + torch.arange(new, device=q.device)
    pages = block_table.gather(1, positions // page)
    k_cache[pages, positions % page], v_cache[pages, positions % page] = k, v
    flat = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    return fused_kv_cache_attention(*flat, k_cache, v_cache, block_table, cache_seqlens, new).view_as(q)


_MODULES: dict[str, dict[str, dict[str, Any]]] = {
    "flash_attn": {"flash_attn": {"flash_attn_with_kvcache": _paged_attention}},
    "liger_kernel": {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": _GatedActivation},
    },
    "omegaconf": {"omegaconf": {"OmegaConf": None, "DictConfig": dict, "ListConfig": list}},
    "torchvision": {"torchvision": {"transforms": None}},
    "wandb": {"wandb": {}},
}
