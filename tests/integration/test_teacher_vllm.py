"""The vLLM teacher in a real Ray actor, against the transformers backend on the same random model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from actors import responder
from actors.responder import ResponseRequest, Sampling
from actors.teacher.actor import as_remote, build_backend
from actors.teacher.targets import TargetRequest
from common.config.data import DataConfig
from common.config.model import ModelConfig
from common.config.run import RunConfig
from common.config.teacher import TeacherConfig
from common.conversion import convert_folder
from common.student import lm_head_weight, load_model
from common.trajectory import from_batch, to_batch
from deploy.export.exported_folder import read_student, write_exported
from deploy.export.hf import write_hf
from tests.models import tiny_qwen3
from tests.unit.test_teacher import META, trajectory

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

MAX_LENGTH = 96


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_qwen3(tmp_path_factory.mktemp("teacher"), max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def run_config(path: str, target: str, **changes: Any) -> RunConfig:
    # sequences are longer than one batch of 64 tokens, so vLLM reads them in pieces
    values = {"target": target, "dtype": "float32", "max_batched_tokens": 64, "kv_cache_mib": 16}
    return RunConfig(
        model=ModelConfig(path=path),
        data=DataConfig(prompts="unused"),
        teacher=TeacherConfig(**{**values, **changes}),
    )


def rows() -> list[Any]:
    """Prompt and response lengths from the shortest to the model's longest; some positions, all, or none."""
    shapes = [
        (1, 1, [0]),
        (20, 60, range(60)),
        (5, 9, [0, 8]),
        (40, 56, [55]),
        (3, 4, []),
        (17, 30, [1, 5, 29]),
    ]
    return [trajectory(i, list(offsets), prompt, n) for i, (prompt, n, offsets) in enumerate(shapes)]


def test_a_student_is_refused_by_vllm_itself(path: str, tmp_path: Path) -> None:
    """It would decode a checkpoint autoregressively, for which it was not trained; an exported one as well, even where
    its code is trusted."""
    convert_folder(path, tmp_path / "student", 4, "auto", torch.float32)
    write_exported(read_student(tmp_path / "student"), tmp_path / "exported", write_hf)
    code = """
import sys
from vllm.config import ModelConfig
for folder in sys.argv[1:]:
    try:
        print(ModelConfig(folder, trust_remote_code=True).architectures)
    except ValueError as error:
        print(str(error).splitlines()[1])
"""
    folders = [path, tmp_path / "student", tmp_path / "exported"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, env=environment)
    plain, student, exported = [line for line in done.stdout.splitlines() if "ForCausalLM" in line]
    assert plain == "['Qwen3ForCausalLM']"
    assert "'Qwen3BlockDiffusionForCausalLM'] are not supported" in student
    assert "'OpdlmForCausalLM'] are not supported" in exported


def test_the_distribution_over_the_tokens_alone(cluster: None, path: str, tmp_path: Path) -> None:
    """A teacher with more rows than the student: both backends give the best of the tokens that both know. The teacher
    is a checkpoint of a student, which is read as its family."""
    convert_folder(path, tmp_path / "student", 4, "auto", torch.float32)
    path = str(tmp_path / "student")
    config = run_config(path, "topk").teacher
    requests = [TargetRequest(t.causal_ids, len(t.prompt_ids) + t.target_offsets) for t in rows()[:3]]
    actor = as_remote(run_config(path, "topk")).remote(config, path, tokens=263)
    batch = to_batch(rows()[:3], META)
    found, _ = from_batch(ray.get(actor.annotate.remote(batch), timeout=300))
    ray.kill(actor)
    exact = build_backend(config.model_copy(update={"backend": "transformers"}), path, 263).targets(requests)
    for t, targets in zip(found, exact, strict=True):
        assert t.topk_ids.max() < 263
        np.testing.assert_allclose(t.topk_logprobs.reshape(targets.logprobs.shape), targets.logprobs, atol=1e-4)
        np.testing.assert_allclose(np.exp(t.log_tail_mass), np.exp(targets.log_tail_mass), atol=1e-4)


@contextmanager
def teacher(path: str, target: str) -> Iterator[Any]:
    config = run_config(path, target)
    actor = as_remote(config).remote(config.teacher, path)
    yield actor
    ray.get(actor.close.remote(), timeout=30)
    ray.kill(actor)


@pytest.fixture(scope="module")
def topk_teacher(cluster: None, path: str) -> Iterator[Any]:
    """One engine for the tests of this target: loading takes longer than all of them."""
    with teacher(path, "topk") as actor:
        yield actor


def annotated(actor: Any, target: str) -> tuple[list[Any], Any]:
    ready = ray.get(actor.ready.remote(), timeout=400)
    assert (ready["vocab_size"], ready["backend"], ready["target_kind"]) == (288, "vllm", target)
    assert psutil.Process(ready["pid"]).children() == []  # the engine lives in the actor
    parts = [to_batch(rows()[i : i + 2], META) for i in range(0, 6, 2)]
    answers = ray.get([actor.annotate.remote(part) for part in parts], timeout=60)
    stats = ray.get(actor.stats.remote(), timeout=10)
    assert (stats["sequences"], stats["queue_depth"], stats["failed_requests"]) == (5, 0, 0)
    return [row for answer in answers for row in from_batch(answer)[0]], from_batch(answers[0])[1]


def reference(path: str, target: str, row: Any) -> Any:
    config = run_config(path, target, backend="transformers").teacher
    request = TargetRequest(row.causal_ids, len(row.prompt_ids) + row.target_offsets)
    return build_backend(config, path).targets([request])[0]


def test_topk_equals_transformers(topk_teacher: Any, path: str) -> None:
    got, meta = annotated(topk_teacher, "topk")
    assert (meta.target_kind, meta.target_width) == ("topk", 16)
    for row in got:
        expected = reference(path, "topk", row)
        ids, logprobs = row.topk_ids.reshape(-1, 16), row.topk_logprobs.reshape(-1, 16)
        np.testing.assert_allclose(logprobs, expected.logprobs, atol=1e-3)
        np.testing.assert_allclose(np.exp(row.log_tail_mass), np.exp(expected.log_tail_mass), atol=1e-3)
        # sets may differ only where tokens tie with the last one
        for mine, theirs, scores in zip(ids, expected.ids, expected.logprobs, strict=True):
            sure = theirs[scores > scores[-1] + 1e-3]
            assert set(sure) <= set(mine)
            assert len(set(mine)) == 16


def test_block_aware_targets_equal_transformers(topk_teacher: Any, path: str) -> None:
    """The tokens before a branch come from the prefix cache; where blocks are longer than its pages, a page may hold
    the beginning of a branch, which is then scored without it."""
    exact = build_backend(run_config(path, "topk", backend="transformers").teacher, path)
    row = rows()[1]
    request = TargetRequest(row.causal_ids, len(row.prompt_ids) + row.target_offsets)
    (targets,) = exact.targets([request])
    written = request.ids[request.positions]
    targets.ids[:, -1] = np.where((targets.ids == written[:, None]).any(1), targets.ids[:, -1], written)
    routed = np.arange(len(request.positions)) % 3 == 1

    def ask(self: Any, block_size: int) -> tuple[Any, list[list[int]]]:
        """The answer, and for each call of the engine how many tokens of each prompt were cached."""
        generate, cached = self.backend.llm.generate, []

        def counted(*arguments: Any, **options: Any) -> Any:
            outputs = generate(*arguments, **options)
            cached.append([output.num_cached_tokens for output in outputs])
            return outputs

        self.backend.llm.generate = counted
        answer = self.thread.submit(self.backend.block_aware, request, targets, block_size, 0.8, routed).result()
        self.backend.llm.generate = generate
        return answer, cached

    for block_size, calls in ((4, 1), (64, 2)):
        found, cached = ray.get(topk_teacher.__ray_call__.remote(ask, block_size), timeout=400)
        expected = exact.block_aware(request, targets, block_size, 0.8, routed)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-3)
        np.testing.assert_array_equal(found.log_tail_mass, targets.log_tail_mass)
        for mine, theirs, scores in zip(found.ids, expected.ids, expected.logprobs, strict=True):
            apart = np.diff(scores) < -2e-3  # what is tied may change places
            firm = np.append(True, apart) & np.append(apart, True)
            np.testing.assert_array_equal(mine[firm], theirs[firm])
        assert np.abs(found.logprobs - targets.logprobs)[routed].max() > 1e-2
        assert len(cached) == calls and max(cached[0]) > 0 and all(not any(again) for again in cached[1:])


def test_too_long_sequences_fail_alone_and_by_name(topk_teacher: Any) -> None:
    long, good = trajectory(7, [59], 40, 60), trajectory(8, [3])
    calls = [topk_teacher.annotate.remote(to_batch([row], META)) for row in (long, good)]
    with pytest.raises(RuntimeError, match=r"ordinals \[7\].*teacher reads 95"):
        ray.get(calls[0], timeout=400)
    assert ray.get(calls[1], timeout=30).num_rows == 1


def test_hidden_times_head_equals_transformers(cluster: None, path: str) -> None:
    with teacher(path, "hidden") as actor:
        got, meta = annotated(actor, "hidden")
    assert (meta.target_kind, meta.target_width, meta.hidden_dtype) == ("hidden", 64, "float32")
    head = lm_head_weight(load_model(path, torch.float32, "sdpa")).detach().numpy()
    for row in got:
        expected = reference(path, "hidden", row)
        hidden = row.hidden.reshape(-1, 64)
        np.testing.assert_allclose(hidden @ head.T, expected.hidden @ head.T, atol=1e-3)


def test_seeded_responses_to_prompts_that_share_a_batch(cluster: None, path: str) -> None:
    """Prompts of 160 tokens in batches of 64: read in pieces, a seeded request rewinds its generator, and fails."""
    config = run_config(path, "hidden")  # as the presets have it: the engine of responses is another one
    actor = responder.as_remote(config).remote(config.teacher, path, 7)
    prompts = [np.arange(20 + i, 20 + i + length, dtype=np.int32) for i, length in enumerate((30, 25, 35, 30, 40))]
    requests = [ResponseRequest(i, sample, ids) for i, ids in enumerate(prompts) for sample in range(2)]
    sampling = Sampling(max_new_tokens=20, temperature=1.0, top_p=0.95, eos_token_id=[1])
    first = ray.get(actor.respond.remote(requests, sampling), timeout=400)
    again = ray.get(actor.respond.remote(requests, sampling), timeout=60)
    assert [ids.tolist() for ids in first] == [ids.tolist() for ids in again]
    assert all(1 <= len(ids) <= 20 for ids in first)
    assert all(a.tolist() != b.tolist() for a, b in zip(first[::2], first[1::2], strict=True)), "samples are alike"
    ray.kill(actor)
