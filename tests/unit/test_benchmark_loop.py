"""The benchmark of the whole loop, without its runs: limits, configs, means, and the tables that are made from rows."""

import json

import numpy as np
import pytest

from common.config.run import RunConfig
from learner.phase_clock import PHASES
from tests.benchmarks import loop, loop_page
from tests.benchmarks.lengths import SIGMA, uneven_lengths


def test_limits_are_those_of_the_log_normal_distribution_cut_at_the_longest():
    limits = np.array(loop.length_limits(1024))
    drawn = np.minimum(1024 * loop.MEDIAN * np.exp(SIGMA * np.random.default_rng(0).standard_normal(200_000)), 1024)
    assert limits.mean() == pytest.approx(drawn.mean(), rel=0.01)
    assert (limits == 1024).mean() == pytest.approx((drawn == 1024).mean(), abs=1 / 64)
    assert sorted(limits) == list(limits) and limits.min() >= 1


def test_every_prompt_has_a_drawn_limit_of_its_own(tmp_path):
    loop._write_prompts(str(loop._PROMPTS), tmp_path / "prompts.jsonl", 64)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    config = RunConfig.model_validate(loop._config("tiny", "m", tmp_path, 20, (1, 1, 1), 0))
    limits = [config.data.domain_max_tokens[row["domain"]] for row in rows]
    assert len(rows) == 4096 and all(row["question"] for row in rows)
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


def row(index: int, seconds: float) -> dict[str, float]:
    stages = {f"seconds/{stage}": seconds / 2 for stage in ("rollout", "teacher", "learner", "publish")}
    busy = {"busy/rollout": 0.5, "busy/teacher": 0.1, "busy/learner": index / 10, "overhead": 0.01}
    phases = {f"learner/{phase}_s": 0.25 for phase in PHASES}
    made = {"seconds/batch": seconds, "updates": 8.0 * index, "response_length": 100.0, "queue/rollout": 64.0}
    return {**made, **stages, **busy, **phases, "rollout/slots_in_use": 0.25 * index}


def test_means_count_batches_by_their_seconds():
    made = loop.metrics([row(1, 1.0), row(2, 3.0)])
    assert made["tokens_per_second"] == pytest.approx(2 * 6400 / 4.0)
    assert made["busy_learner"] == pytest.approx((0.1 * 1 + 0.2 * 3) / 4)
    assert made["seconds_per_batch"] == 2.0 and made["seconds_rollout"] == 1.0 and made["slots_in_use"] == 0.375
    assert made["update_s"] == pytest.approx(1.5 / 8)  # eight updates between the two rows
    assert made["learner_seconds"] == dict.fromkeys(PHASES, 0.25)
    assert loop.metrics([{**row(1, 1.0), "rollout/slots_in_use": None}])["slots_in_use"] is None


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
