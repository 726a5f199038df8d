"""Compiled code is kept: actors get the folder before they load torch, and what one process compiled the next finds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from common.compiled_code import compiled_code_environment
from common.config.cluster import RayConfig
from common.config.resources import Resources
from common.ray_actor import as_ray_actor
from deploy.cluster import connect

pytestmark = pytest.mark.integration

# the forward of a decoder layer, compiled as a learner with learner.compile does
_COMPILES = """
import json, torch
from torch._dynamo.utils import counters
from transformers import Qwen3Config, Qwen3ForCausalLM
from learner.compiled_layers import compile_layers
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=1, vocab_size=64, **sizes))
compile_layers(model)
with torch.no_grad():
    loss = model(torch.arange(12)[None]).logits.square().sum()
counted = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("miss", "hit")}
print(json.dumps({"loss": loss.item(), **counted}))
"""


def compiled(folder: Path) -> dict[str, Any]:
    environment = {**os.environ, **compiled_code_environment(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILES], check=True, capture_output=True, text=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(600)
def test_a_second_run_compiles_nothing_and_neither_does_one_with_a_copy_of_the_folder(tmp_path):
    first = compiled(tmp_path / "here")
    assert first["miss"] > 0 and first["hit"] == 0
    assert list((tmp_path / "here" / "inductor").rglob("*.py"))
    second = compiled(tmp_path / "here")
    assert second == {"loss": first["loss"], "miss": 0, "hit": first["miss"]}
    shutil.move(tmp_path / "here", tmp_path / "shipped")
    assert compiled(tmp_path / "shipped") == second
    assert not (tmp_path / "here").exists()


class Shows:
    def environment(self) -> dict[str, str]:
        return dict(os.environ)


@pytest.mark.long
def test_actors_know_the_folder_from_their_first_line_on(tmp_path):
    connect(RayConfig(num_cpus=1), object_store_mib=80, cache_dir=tmp_path)
    try:
        actor = as_ray_actor(Shows, Resources(cpus=0.1, threads=3)).remote()
        seen = ray.get(actor.environment.remote())
        assert compiled_code_environment(tmp_path).items() <= seen.items()
        assert seen["OMP_NUM_THREADS"] == "3"
    finally:
        ray.shutdown()
