"""The benchmark of the whole loop: limits, configs, means, and the tables that are made from rows; its runs as a long
test."""

import base64
import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from common.config.model import ModelShape
from common.config.run import RunConfig
from deploy.placement import plan
from learner.phase_clock import PHASES
from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import loop, loop_page
from tests.benchmarks.lengths import SIGMA, uneven_lengths
from tests.benchmarks.models import SIZES, matmul_rate
from tests.benchmarks.mps import multi_process_service
from tests.benchmarks.tokenizers import _PATTERN, benchmark_tokenizer
from tests.benchmarks.train_run import TrainRun, train

H200_GIB = 139


def test_limits_are_those_of_the_log_normal_distribution_cut_at_the_longest():
    limits = np.array(loop.length_limits(1024))
    drawn = np.minimum(1024 * loop.MEDIAN * np.exp(SIGMA * np.random.default_rng(0).standard_normal(200_000)), 1024)
    assert limits.mean() == pytest.approx(drawn.mean(), rel=0.01)
    assert (limits == 1024).mean() == pytest.approx((drawn == 1024).mean(), abs=1 / 64)
    assert sorted(limits) == list(limits) and limits.min() >= 1


def test_every_prompt_has_a_drawn_limit_of_its_own(tmp_path):
    assert loop._write_prompts(str(loop._PROMPTS), tmp_path / "prompts.jsonl", "tiny", 3000) == 3000
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    config = RunConfig.model_validate(loop._config("tiny", "m", tmp_path, 20, (1, 1, 1), 0))
    limits = [config.data.domain_max_tokens[row["domain"]] for row in rows]
    assert len(rows) == 3000 and all(row["question"] for row in rows)
    assert np.mean(limits) == pytest.approx(np.mean(loop.length_limits(64)), rel=0.03)


@pytest.mark.parametrize(
    ("split", "gpus", "transport"),
    [("1:0:0", 1, "object_store"), ("1:1:0", 2, "object_store"), ("2:1:1", 4, "broadcast"), ("3:1:0", 4, None)],
)
def test_a_split_takes_all_of_its_gpus_and_no_more(tmp_path, split, gpus, transport):
    config = RunConfig.model_validate(loop._config("4b", "m", tmp_path, 20, loop._parts(split), gpus))
    roles = ((config.learner, config.learner.ranks), (config.rollout, config.rollout.actors))
    roles += ((config.teacher, config.teacher.actors),)
    assert sum(count * role.resources.gpus for role, count in roles) == pytest.approx(gpus)
    assert transport in (None, config.weights_transport)
    assert config.learner.batch_rows == 16 * config.learner.ranks


@pytest.mark.parametrize("size", ["135m", "0.6b", "4b"])
def test_all_roles_of_every_size_have_room_on_one_gpu(tmp_path, size):
    config = loop._config(size, "m", tmp_path, 20, (1, 0, 0), 1)
    s = SIZES[size]
    shape = {"layers": s["num_hidden_layers"], "heads": s["num_attention_heads"], "kv_heads": s["num_key_value_heads"]}
    same = ("hidden_size", "head_dim", "intermediate_size", "vocab_size")
    config["model"]["shape"] = ModelShape(
        **shape, **{name: s[name] for name in same}, tied_embeddings=True
    ).model_dump()
    needed = sum(process.total_bytes for process in plan(RunConfig.model_validate(config)).processes)
    assert 5 < needed / 2**30 < 0.95 * H200_GIB


def row(index: int, seconds: float) -> dict[str, float]:
    stages = {f"seconds/{stage}": seconds / 2 for stage in ("rollout", "teacher", "learner", "publish")}
    busy = {"busy/rollout": 0.5, "busy/teacher": 0.1, "busy/learner": index / 10, "overhead": 0.01}
    phases = {f"learner/{phase}_s": 0.25 for phase in PHASES}
    made = {"seconds/batch": seconds, "updates": 8.0 * index, "response_length": 100.0, "queue/rollout": 64.0}
    made |= {"time": 1000.0 + index, "learner/tokens_per_second": 2000.0, "trained_positions": 300.0}
    return {**made, **stages, **busy, **phases, "rollout/slots_in_use": 0.25 * index}


def test_means_count_batches_by_their_seconds():
    made = loop.metrics([row(1, 1.0), row(2, 3.0)])
    assert made["tokens_per_second"] == pytest.approx(2 * 6400 / 4.0)
    assert made["busy_learner"] == pytest.approx((0.1 * 1 + 0.2 * 3) / 4)
    assert made["seconds_per_batch"] == 2.0 and made["seconds_rollout"] == 1.0 and made["slots_in_use"] == 0.375
    assert made["update_s"] == pytest.approx(1.5 / 8)  # eight updates between the two rows
    assert made["learner_seconds"] == dict.fromkeys(PHASES, 0.25)
    assert loop.metrics([{**row(1, 1.0), "rollout/slots_in_use": None}])["slots_in_use"] is None


@pytest.fixture
def runs(monkeypatch):
    """The rows of runs in place of the runs; what each was asked."""
    asked = []

    def made(config, fields, environment, late=None):
        asked.append((config, fields, late))
        batches = int(fields[fields.index("--pipeline.max_batches") + 1])
        return TrainRun(990.0, [row(i + 1, 2.0) for i in range(batches)])

    monkeypatch.setattr(loop, "train", made)
    monkeypatch.setattr(loop, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    return asked


def test_a_row_of_the_loop_comes_after_the_first_run_and_whole_after_the_second(runs, tmp_path):
    out, file = tmp_path / "out.json", tmp_path / "rows.json"
    file.write_text('[{"size": "earlier"}]')
    options = ["--device", "cpu", "--parts", "loop", "--batches", "3", "--out", str(out), "--rows", str(file)]
    assert benchmarks.main([*options, "--", "--learner.lr", "1e-5"]) == 0
    earlier, measured = json.loads(file.read_text())
    assert earlier == {"size": "earlier"} and json.loads(out.read_text())["loop tiny"] == [
        {name: value for name, value in measured.items() if name != "torch"}
    ]
    absent = {name for name, value in measured.items() if value is None}
    assert absent == {"gpu_busy", "split"}  # of GPUs
    assert measured["size"] == "tiny" and measured["card"] == "cpu" and measured["fields"] == "--learner.lr 1e-5"
    assert (measured["tokenizer_entries"], measured["vocabulary"], measured["weights"]) == (49152, 49152, "random")
    assert (measured["batches"], measured["tokens_per_second"]) == (3, 3200.0)
    assert measured["loading_cold_s"] == measured["loading_cached_s"] == 1001 - 2 - 990
    assert measured["first_batch_cold_s"] == measured["first_batch_cached_s"] == 2.0
    assert 0 < measured["learner_mfu"] < 1
    (first, fields, late), second = runs
    assert fields[:2] == ["--pipeline.max_batches", "5"] and fields[-2:] == ["--learner.lr", "1e-5"]
    assert second == (first, ["--pipeline.max_batches", "1", *fields[2:]], None) and late is None


def test_the_first_row_stays_where_the_second_run_fails(runs, tmp_path, monkeypatch):
    made = loop.train

    def fails_with_caches(*asked):
        if runs:
            raise subprocess.CalledProcessError(1, ["train"])
        return made(*asked)

    monkeypatch.setattr(loop, "train", fails_with_caches)
    out = tmp_path / "out.json"
    assert benchmarks.main(["--device", "cpu", "--parts", "loop", "--batches", "1", "--out", str(out)]) == 1
    (measured,) = json.loads(out.read_text())["loop tiny"]
    assert measured["first_batch_cold_s"] == 2.0 and "first_batch_cached_s" not in measured


def test_a_time_budget_leaves_the_second_run_as_long_as_the_first_took_to_its_first_batch():
    def run(batches: int) -> TrainRun:  # 40 s to the first batch, by now 100 s
        start = time.time() - 100
        return TrainRun(start, [row(1, 10.0) | {"time": start + 40} for _ in range(batches)])

    assert not loop._late(150.0)(run(3)) and loop._late(130.0)(run(3))
    assert not loop._late(130.0)(run(2)), "without a batch after the warm-up there is nothing to measure"
    assert loop._late(None) is None


def test_a_run_that_cannot_start_is_an_error(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        train({"name": "loop", "block_size": 0}, [], {})


@pytest.mark.long
@pytest.mark.integration
def test_the_loop_is_measured_on_cpu_with_a_real_tokenizer(tmp_path):
    file = tmp_path / "rows.json"
    options = ["--device", "cpu", "--parts", "loop", "--batches", "1", "--rows", str(file)]
    assert benchmarks.main(options) == 0
    (measured,) = json.loads(file.read_text())
    assert measured["batches"] == 1 and measured["tokens_per_second"] > 0 and 0 < measured["learner_mfu"] < 1
    assert measured["first_batch_cold_s"] > 0 and measured["first_batch_cached_s"] > 0
    assert all(seconds > 0 for seconds in measured["learner_seconds"].values())


def test_processes_under_mps_know_its_folder_and_it_ends_with_them(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text(f'#!/bin/sh\necho "$@ $CUDA_MPS_PIPE_DIRECTORY $(head -n 1)" >> {tmp_path}/calls\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with multi_process_service(False) as nothing:
        assert nothing == {}
    with multi_process_service(True) as places:
        folder = places["CUDA_MPS_PIPE_DIRECTORY"]
        assert Path(folder).is_dir()
        assert (tmp_path / "calls").read_text().strip() == f"-d {folder}"
    assert (tmp_path / "calls").read_text().splitlines()[1].strip() == f"{folder} quit -t 20"


def test_a_file_of_byte_pairs_is_a_tokenizer_with_chats(tmp_path):
    pairs = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b"12"]
    file = tmp_path / "qwen.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(pair) + b" %d\n" % i for i, pair in enumerate(pairs)))
    tokenizer = benchmark_tokenizer("0.6b", str(file))
    text = "hello, 12 hells\n"
    ranks = {pair: i for i, pair in enumerate(pairs)}
    expected = tiktoken.Encoding("pairs", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={}).encode(text)
    assert tokenizer(text).input_ids == expected and tokenizer.decode(expected) == text
    assert len(tokenizer) == 263 and tokenizer.eos_token == "<|im_end|>"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_rate_of_a_product_on_cpu_is_that_of_one_thread():
    assert 1e9 < matmul_rate("cpu") < 1e13


def test_shares_of_a_gpu_are_means_between_two_times():
    use = loop.GpuUse(2)
    use._samples = [(0.0, [100, 100]), (1.0, [50, 0]), (2.0, [100, 20]), (3.0, [0, 0])]
    assert use.shares(0.5, 2.0) == [0.75, 0.1]
    assert loop.GpuUse(0).shares(0.0, 9.0) is None


def test_rows_are_added_behind_those_that_are_there(tmp_path):
    file = tmp_path / "rows.json"
    loop_page.add_rows(file, [{"size": "a"}])
    loop_page.add_rows(file, [{"size": "b"}, {"size": "c"}])
    assert [row["size"] for row in json.loads(file.read_text())] == ["a", "b", "c"]


def test_page_is_as_generated():
    text = loop_page.PAGE.read_text()
    assert loop_page.page(text, json.loads(loop_page.ROWS.read_text())) == text, "run tests.benchmarks.loop_page"
    assert "<!-- begin loop -->" in text


def test_tables_hold_every_row_and_say_where_the_learners_time_goes():
    measured = {"size": "135m", "gpus": 2, "split": "1:1:0", "card": "H200", "fields": "--learner.compile false"}
    measured |= {
        "loading_cold_s": 30.2,
        "loading_cached_s": 21.0,
        "gpu_busy": [0.5, 0.25],
        "learner_mfu": 0.213,
        "first_batch_cold_s": 81.6,
        "first_batch_cached_s": 7.92,
    }
    text = loop_page.page("<!-- begin loop -->\nas before\n<!-- end loop -->", [measured | loop.metrics([row(1, 2.0)])])
    assert "| 135m | 2 H200 (1:1:0) | --learner.compile false | 100 | 3,200 | 50% 25% | 50% / 10% / 10% |" in text
    assert "| 21% | 30 / 21 | 82 / 7.9 |" in text and "as before" not in text
    assert "| 1.75 |" + " 14% |" * 7 in text


def test_uneven_lengths_have_the_mean_and_are_far_apart():
    lengths = uneven_lengths(220, 16)
    assert len(lengths) == 16 and np.mean(lengths) == pytest.approx(220, rel=0.01)
    assert max(lengths) > 10 * min(lengths) and lengths != sorted(lengths)
