"""The benchmarks' command: a part that cannot run here costs its own results only."""

import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from actors.sampler.autoregressive import AutoregressiveSampler
from common.config.file import load_config
from common.conversion import convert_folder
from common.student import load_model
from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import learner_step, pipeline, sampler, scaling, serve, teacher, verified
from tests.benchmarks.loop import Wanted
from tests.models import tiny_qwen3
from tests.unit.test_verification import EOS, MASK, TOKENS, context_causal, greedy, requests


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Three light parts in place of the real ones: the second lacks a package after its first row."""
    seen: list[dict[str, Any]] = []

    def whole(size: str, device: str, *plan: int) -> Iterator[dict[str, Any]]:
        yield {"size": size, "device": device, "plan": list(plan), "tokens_per_second": 12.5}

    def without_its_package(size: str, device: str) -> Iterator[dict[str, Any]]:
        yield {"variant": "plain"}
        seen.append(json.loads((tmp_path / "out.json").read_text()))
        import liger_kernel_that_is_not_there  # noqa: F401

    monkeypatch.setattr(benchmarks, "PARTS", {"sampler": whole, "learner": without_its_package, "teacher": whole})
    monkeypatch.setattr(benchmarks, "PLANS", {"tiny": {"sampler": (1, 2), "learner": (), "teacher": (3,)}})
    monkeypatch.setattr(benchmarks, "PROFILES", {})
    return seen


def measured(tmp_path, *options: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "out.json"
    status = benchmarks.main(
        ["--device", "cpu", "--parts", "sampler", "learner", "teacher", "--out", str(out), *options]
    )
    return status, json.loads(out.read_text())


def test_a_part_without_its_package_is_skipped_by_name_and_the_rest_is_measured(parts, tmp_path, capsys):
    status, results = measured(tmp_path, "--sequences", "7")
    assert status == 0
    reason = "ModuleNotFoundError: No module named 'liger_kernel_that_is_not_there'"
    assert results["skipped"] == {"learner tiny": reason}
    assert results["learner tiny"] == [{"variant": "plain"}]
    assert [row["plan"] for row in results["sampler tiny"] + results["teacher tiny"]] == [[7, 2], [3]]
    assert f"learner tiny skipped: {reason}" in capsys.readouterr().out


def test_rows_are_in_the_file_as_soon_as_they_are_measured(parts, tmp_path):
    measured(tmp_path)
    assert parts[0]["sampler tiny"] and parts[0]["learner tiny"] == [{"variant": "plain"}]
    assert "teacher tiny" not in parts[0]


def test_a_part_that_fails_is_named_too_and_the_status_says_so(parts, tmp_path, monkeypatch, capsys):
    def fails(size: str, device: str, *plan: int) -> Iterator[dict[str, Any]]:
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setitem(benchmarks.PARTS, "sampler", fails)
    monkeypatch.setitem(benchmarks.PROFILES, "teacher", fails)
    status, results = measured(tmp_path, "--profile")
    assert status == 1
    assert results["skipped"].keys() == {"sampler tiny", "learner tiny", "teacher tiny"}
    assert results["skipped"]["sampler tiny"] == "RuntimeError: out of memory"
    assert len(results["teacher tiny"]) == 1  # measured before its profile failed
    assert "RuntimeError: out of memory" in capsys.readouterr().err


def test_every_part_gives_its_rows_one_by_one():
    assert all(inspect.isgeneratorfunction(measure) for measure in benchmarks.PARTS.values())


@pytest.mark.parametrize(
    ("measure", "plan", "rows"),
    [
        (sampler.measure, (2, 8, 8), 3),
        (learner_step.measure, (2, 8, 8, 512), 5),
        (teacher.measure, (2, 8, 8, 64), 5),
        (serve.measure, (2, 8, 8, (2,)), 3),
    ],
)
def test_the_parts_of_one_process_run_on_a_small_plan(measure, plan, rows, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # vLLM would be started too
    measured = list(measure("tiny", "cpu", *plan))
    assert len(measured) == rows
    assert all(row["size"] == "tiny" for row in measured)


def test_the_costs_of_the_sweeps_are_measured_on_a_small_plan(monkeypatch):
    monkeypatch.setattr(scaling, "_ROWS", 2)
    model = scaling.random_model("tiny", "cpu")
    costs = (scaling._sampler_cost(model, 2, 4), scaling._teacher_cost(model, 4), scaling._learner_cost(model, 4))
    assert all(cost > 0 for cost in costs)


@pytest.mark.parametrize(("size", "gpus"), [("tiny", 0), ("0.6b", 0), ("0.6b", 2)])
def test_the_fields_of_the_pipelines_run_are_those_of_a_config(tmp_path, monkeypatch, size, gpus):
    monkeypatch.setattr(pipeline, "save_random_model", lambda *_: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    overrides = [] if size == "tiny" else pipeline._of_a_size(size, "cpu", str(tmp_path))
    overrides += pipeline._on_gpus() if gpus else []
    config = load_config("tiny", pipeline._fields(overrides, 7, str(tmp_path)))
    assert (config.pipeline.max_batches, config.output_dir) == (7, tmp_path)
    assert config.learner.resources.gpus == (1 if gpus else 0)
    assert config.curriculum.max_tokens == (56 if size == "tiny" else 256)


def test_a_student_is_served_beside_the_original(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # vLLM would be started too
    arlm = tiny_qwen3(tmp_path / "arlm", seed=2)
    convert_folder(arlm, tmp_path / "student", 4, "<|mask|>", torch.float32)
    wanted = Wanted(model=str(tmp_path / "student"), original=arlm, clients=(3,))
    ours, vllm, transformers = serve.measure("tiny", "cpu", 2, 0, 12, wanted=wanted)
    assert [row["system"] for row in (ours, vllm, transformers)] == ["opdlm", "vllm", "transformers"]
    assert vllm["skipped"] == "ModuleNotFoundError: vLLM is not installed"
    for row in (ours, transformers):
        assert (row["clients"], row["requests"]) == (3, 16)
        assert 0 < row["tokens_per_response"] <= 12
        assert 0 < row["first_block_p50_seconds"] <= row["latency_p50_seconds"] <= row["latency_p99_seconds"]
        assert row["open_requests_per_second"] * row["tokens_per_response"] == pytest.approx(
            0.8 * row["tokens_per_second"]
        )
    assert ours["overhead"] == pytest.approx(ours["bare_tokens_per_second"] / ours["tokens_per_second"] - 1)


def test_serving_begins_no_row_when_its_time_is_over():
    rows = list(serve.measure("tiny", "cpu", 2, 8, 8, wanted=Wanted(seconds=1e-9, clients=(1, 2))))
    assert [(row["system"], row["skipped"]) for row in rows] == [
        (system, "the time was over") for system in ("opdlm", "opdlm", "vllm", "transformers")
    ]


def test_without_an_original_the_student_is_measured_alone(tmp_path):
    convert_folder(tiny_qwen3(tmp_path / "arlm", seed=2), tmp_path / "student", 4, "<|mask|>", torch.float32)
    wanted = Wanted(model=str(tmp_path / "student"), clients=(1,), seconds=1e-9)
    *_, others = serve.measure("tiny", "cpu", 1, 0, 4, wanted=wanted)
    assert others["skipped"] == "there is no --original"


def test_verified_decoding_is_measured_against_one_token_decoding_of_the_same_text(monkeypatch):
    monkeypatch.setattr(verified, "SEQUENCES", (1, 8))
    one, eight = verified.measure("tiny", "cpu", 9, 6, 5)
    assert (one["sequences"], eight["sequences"], one["block"]) == (1, 8, 8)
    for row in (one, eight):
        assert (row["responses"], row["tokens"], row["differing_responses"]) == (9, 45, 0)
        assert row["tokens_per_forward"] >= 0.5
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / row["causal_tokens_per_second"])


def test_one_token_decoding_reads_clean_tokens_alone_and_writes_the_greedy_text(tmp_path):
    path = tiny_qwen3(tmp_path, seed=2)
    plain, asked = load_model(path, torch.float32, "sdpa"), requests(9)
    sampled = AutoregressiveSampler(
        context_causal(path), never_written=MASK, eos_token_id=EOS, token_count=TOKENS, slots=3, seed=0
    )
    rows: list[int] = []
    sampled.model.model.register_forward_hook(lambda module, given, out: rows.append(out[0].shape[:2].numel()))
    made = {t.ordinal: t.response_ids.tolist() for t in sampled.generate(asked, verified.GREEDY)}
    assert made == {r.ordinal: greedy(plain, r.prompt_ids, 9) for r in asked}
    prefills = sum(max(len(r.prompt_ids) - 1, 0) for r in asked)
    assert sum(rows) <= sum(map(len, made.values())) + 3 * prefills  # padding of prefills included
