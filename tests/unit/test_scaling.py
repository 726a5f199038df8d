"""The recipe on paper, and the page that is made from it."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from common.config.file import load_config
from learner.packing import assign_ranks
from tests.benchmarks import pipeline, scaling, scaling_page
from tests.benchmarks.recipe_model import Assumed, Batch, Split, _dealt, _lengths, best_split, estimate, rates

RESULTS = json.loads(scaling_page.GPU.read_text())
RATES, ASSUMED = rates(RESULTS), Assumed()


@pytest.fixture(scope="module")
def config():
    return load_config("qwen3-8b")


def test_page_is_as_generated():
    text = scaling_page.PAGE.read_text()
    assert scaling_page.page(text) == text, "run python -m tests.benchmarks.scaling_page"


def test_rates_are_those_of_the_results():
    """By hand: 4.3 TB/s and, after two seconds of them, products at 640 to 670 TFLOP/s were measured on this device."""
    assert 4e12 < RATES.copy < 4.8e12
    assert 6e14 < RATES.products < 7e14
    row = {"size": "4b", "variant": "causal", "tokens_per_second": RATES.products * 0.3 / (2 * 3.633e9)}
    published = [{"way": "object_store", "gb_per_s": 20.0}, {"way": "broadcast", "gb_per_s": 60.0}]
    measured = rates(RESULTS | {"teacher 4b": [row], "publish 4b": published})
    assert measured.teacher == pytest.approx(0.3, rel=1e-3) and measured.publish == 20e9
    with pytest.raises(ValueError, match="lack the sampler"):
        rates({"device": "x"})


def test_lengths_have_the_mean_and_the_limit():
    lengths = _lengths(Batch(prompts=128, rows=8, mean=1068.0, limit=4000, budget=16384))
    assert lengths.mean() == pytest.approx(1068, rel=1e-3)
    assert lengths.max() == pytest.approx(4000)


def test_rows_are_dealt_as_the_learner_deals_them():
    tokens = np.random.default_rng(0).integers(1, 50, 40).astype(float)
    dealt = _dealt(tokens, 7)
    for rank, share in enumerate(assign_ranks(tokens.astype(int).tolist(), 7)):
        assert sorted(share) == np.flatnonzero(dealt == rank).tolist()


def test_a_stage_by_hand(config):
    """Two actors: 2,000 passes of some half of the floor's speed; the floor is the greater of reading 7.57B parameters
    and the live caches, and the products of 64 blocks with these parameters."""
    e = estimate(config, Split(2, 2, 4), RATES, ASSUMED)
    lengths = _lengths(Batch(128, 8, ASSUMED.response, 4000, 16384))
    cached = (lengths / 4000 * (200 + lengths / 2))[::2].sum()
    memory = (2 * 7.57e9 + cached * 2 * 36 * 8 * 128 * 2) / RATES.copy
    seconds = 2000 * max(memory, 2 * 7.57e9 * 64 * 4 / RATES.products) / RATES.of_floor
    assert e.seconds["rollout"] == pytest.approx(seconds, rel=0.02)
    flops = 6 * (6.95e9 * (128 * 200 + 2 * lengths.sum()) + 0.62e9 * 0.62 * lengths.sum())
    ideal = flops / (4 * RATES.learner * RATES.products)
    assert ideal < e.seconds["learner"] < 2 * ideal
    assert e.network["weights"] == 0  # all in one node


def test_stages_bound_the_batch_and_more_gpus_never_slow_it(config):
    times = []
    for gpus in (8, 16, 64, 512):
        e = best_split(config, gpus, RATES, ASSUMED)
        in_turn, overlapped = e.batch_seconds
        assert e.split.used <= gpus and e.split.learner <= config.learner.batch_rows
        assert overlapped <= in_turn
        times.append(overlapped)
    assert all(later <= 1.03 * before for before, later in pairwise(times))
    learner = replace(RATES, learner=2 * RATES.learner)  # alone it is the learner that binds
    both = replace(learner, of_floor=2 * RATES.of_floor)
    times = [best_split(config, 64, rates, ASSUMED).batch_seconds[1] for rates in (RATES, learner, both)]
    assert times[0] > times[1] > times[2]


def test_plot_is_a_png(tmp_path):
    rows = [{"sweep": "length", "part": "sampler", "x": x, "cost": y} for x, y in ((1, 2.0), (2, 3.0))]
    scaling.plot([*rows, *({**row, "sweep": "vocabulary"} for row in rows)], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_pipeline_metrics_weigh_batches_by_their_time():
    names = ("rollout", "teacher", "learner", "publish")

    def row(seconds: float, overhead: float) -> dict[str, float]:
        stages = {f"seconds/{name}": seconds / (2 + i) for i, name in enumerate(names)}
        return {"seconds/batch": seconds, "overhead": overhead, "busy/rollout": 0.5, "busy/learner": 0.25, **stages}

    metrics = pipeline.metrics([row(9.0, 1.0), row(9.0, 1.0), row(1.0, 0.5), row(3.0, 0.1)])  # two warm up
    assert metrics["seconds_batch"] == 2.0
    assert metrics["overhead"] == pytest.approx((0.5 + 0.3) / 4)
    assert metrics["busy_slower_role"] == 0.5
    assert "| nobody computes | 0.400 | 20.0% |" in pipeline.table({"staleness": 0, **metrics})
