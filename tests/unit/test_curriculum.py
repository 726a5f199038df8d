"""The response length limit: ends, shape, and the block grid."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.config.errors import ConfigError
from common.config.rollout import RolloutConfig
from common.config.run import RunConfig
from common.config.schedule import CurriculumConfig
from deploy.checkpoints import RunState
from deploy.commands.dry_run import _later_teaching
from deploy.curriculum import Feedback, block_size_at, response_limit, unmasking_at
from deploy.preflight import _check_anchor
from deploy.run_folder import anchor_of


def test_linear_grows_evenly_from_least_to_greatest():
    config = CurriculumConfig(schedule="linear", min_tokens=100, max_tokens=4000, batches=10)
    assert [response_limit(config, s, 4) for s in (0, 1, 5, 10, 99)] == [100, 488, 2048, 4000, 4000]


def test_cos_starts_slowly_and_follows_its_formula():
    config = CurriculumConfig(schedule="cos", min_tokens=100, max_tokens=4000, batches=100)
    for s in range(0, 130, 7):
        exact = 100 + (1 - math.cos(math.pi * min(1, s / 100) / 2)) * 3900
        limit = response_limit(config, s, 4)
        assert limit % 4 == 0
        assert exact - 4 < limit <= exact + 1e-6
    assert response_limit(config, 10, 4) < 100 + 0.1 * 3900
    assert response_limit(config, 100, 4) == 4000


def test_constant_is_the_greatest_from_the_start():
    config = CurriculumConfig(schedule="constant", min_tokens=100, max_tokens=400)
    assert {response_limit(config, s, 4) for s in (0, 1, 1000)} == {400}


@given(
    schedule=st.sampled_from(["constant", "linear", "cos"]),
    block=st.sampled_from([1, 4, 8, 32]),
    least=st.integers(1, 50),
    more=st.integers(0, 200),
    batches=st.integers(1, 300),
)
def test_limit_lies_on_the_grid_never_shrinks_and_reaches_both_ends(schedule, block, least, more, batches):
    config = CurriculumConfig(
        schedule=schedule, min_tokens=least * block, max_tokens=(least + more) * block, batches=batches
    )
    limits = [response_limit(config, s, block) for s in range(batches + 2)]
    assert all(limit % block == 0 for limit in limits)
    assert limits == sorted(limits)
    assert limits[-1] == limits[-2] == config.max_tokens
    assert schedule == "constant" or limits[0] == config.min_tokens


@pytest.mark.parametrize("schedule", ["linear", "cos"])
def test_never_below_one_block(schedule):
    config = CurriculumConfig(schedule=schedule, min_tokens=1, max_tokens=64, batches=10)
    assert response_limit(config, 0, 16) == 16


def run(**changes) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"prompts": "p"},
            "curriculum": {"min_tokens": 16, "max_tokens": 64},
            **changes,
        }
    )


def test_blocks_grow_by_step():
    config = run(block_growth={"kind": "steps", "sizes": [8, 16], "at_batches": [10, 30]})
    sizes = [block_size_at(config, batch, Feedback()) for batch in (0, 9, 10, 29, 30, 99)]
    assert sizes == [4, 4, 8, 8, 16, 16]
    assert config.block_sizes == (4, 8, 16)


def test_blocks_grow_on_a_plateau_with_a_fresh_window_each():
    config = run(block_growth={"kind": "plateau", "sizes": [8, 16], "window": 3, "min_improvement": 0.1})
    feedback, sizes = Feedback(), []
    falling = [0.8**i for i in range(10)]
    for batch, kl in enumerate([*falling, *[0.1] * 4, *[0.5] * 20]):
        sizes.append(block_size_at(config, batch, feedback))
        feedback.after_batch(config, kl, 0.0)
    assert sizes.index(8) == 14 + 1  # three level ones after three that were no better than 10% above
    assert sizes.index(16) == sizes.index(8) + 6
    assert feedback.growths == 2
    assert not feedback.divergences


def test_the_feedback_of_a_long_run_stays_short():
    config = run(block_growth={"kind": "plateau", "sizes": [8, 16], "window": 3, "min_improvement": 0.1})
    feedback = Feedback()
    for batch in range(100):
        feedback.after_batch(config, 0.8**batch, 0.0)
    assert feedback.growths == 0 and feedback.divergences == [0.8**batch for batch in range(94, 100)]


def grown(shares: list[float], feedback: Feedback, **growth) -> list[int]:
    """The block size of the rollout batch behind each evaluation, of which each is measured one batch late."""
    fields = {"kind": "acceptance", "sizes": [8, 16], **growth}
    config = run(block_growth=fields, evaluation={"held_out_prompts": 8, "every_batches": 1})
    sizes = [block_size_at(config, 0, feedback)]
    for share in shares:
        measured = sizes[-2] if len(sizes) > 1 else sizes[-1]
        feedback.after_evaluation(config, measured, 0.1, 0.1, share)
        sizes.append(block_size_at(config, len(sizes), feedback))
    return sizes[1:]


def test_blocks_grow_when_drafts_are_kept():
    feedback = Feedback()
    # the evaluation behind a growth is still of the size before, however good it is
    assert grown([0.3, 0.69, 0.7, 0.9, 0.2, 0.75, 0.9, 1.0], feedback, accepted=0.7) == [4, 4, 8, 8, 8, 16, 16, 16]
    assert (feedback.growths, feedback.acceptances) == (2, [])


def test_blocks_grow_when_drafts_get_no_better():
    feedback = Feedback()
    shares = [0.3, 0.4, 0.35, 0.4, 0.5, 0.5, 0.1, 0.2, 0.3, 0.4]
    assert grown(shares, feedback, accepted=0.9, patience=3) == [4] * 7 + [8] * 3
    assert feedback.acceptances == [0.4]
    waiting = Feedback()
    assert grown(shares * 3, waiting, accepted=0.9) == [4] * 30
    assert waiting.acceptances == [0.5]  # of a long run no more is kept


def test_acceptance_must_be_measured():
    growth = {"kind": "acceptance", "sizes": [8]}
    for field in ("held_out_prompts", "every_batches"):
        evaluation = {"held_out_prompts": 8, "every_batches": 1} | {field: 0}
        with pytest.raises(
            ValidationError, match=rf"block_growth\.kind 'acceptance' measures .* evaluation\.{field} is 0"
        ):
            run(block_growth=growth, evaluation=evaluation)
    with pytest.raises(ValidationError, match=r"block_size \(1\) leaves nothing to draft"):
        run(block_size=1, block_growth=growth, evaluation=HELD_OUT)


ANCHORED = {"kind": "steps", "sizes": [8, 16], "at_batches": [1, 2], "anchor": True}


def test_the_student_of_the_size_before_teaches():
    config = run(block_growth=ANCHORED, name="r", output_dir="/out")
    folders = [anchor_of(config, size) for size in (4, 8, 16)]
    assert folders == [None, Path("/out/r/anchors/block-4"), Path("/out/r/anchors/block-8")]
    plain = run(block_growth={**ANCHORED, "anchor": False})
    assert [anchor_of(plain, size) for size in (4, 8)] == [None, None]
    taught = config.anchored(folders[1])
    assert (taught.teacher_path, taught.teacher.reads) == ("/out/r/anchors/block-4", "state")
    assert RunConfig.model_validate(taught.model_dump(mode="json")) == taught  # as opdlm replay reads it


def test_dry_run_says_who_teaches():
    config = run(block_growth=ANCHORED)
    expected = (
        "stage anchors: the student of block size 4 teaches blocks of 8, then 8 teaches blocks of 16, in the place"
    )
    assert [line.startswith(expected) for line in _later_teaching(config)] == [True]
    assert _later_teaching(run()) == []
    aware = {"objective": {"target": {"kind": "teacher", "block_aware": 0.5}}}
    teacher = {"target": "topk", "backend": "transformers", "top_k": 16}
    growth = {"kind": "steps", "sizes": [16], "at_batches": [1]}
    (line,) = _later_teaching(run(**aware, teacher=teacher, block_growth=growth))
    assert line.endswith("so many more: 24 at block size 4 and 120 at block size 16")
    aware["objective"]["target"]["routed_share"] = 0.5
    (_, line) = _later_teaching(run(**aware, teacher=teacher | {"backend": "vllm"}, block_growth=growth))
    assert line.endswith("a prompt of its own, and a trained token has 6 at block size 4 and 7.5 at block size 16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"target": {"kind": "hard"}}}, r"makes the student the teacher, and the objective has none"),
        (
            {"teacher": [{"path": "a", "domains": ["math"]}, {"path": "b"}]},
            r"makes the student the teacher of all domains, but there are 2 teachers",
        ),
        ({"adapter": {"rank": 4}}, r"needs whole students, and adapter\.rank \(4\) writes adapters"),
        (
            {"objective": {"state": {"kind": "all_rounds"}}},
            r"trains a position in several states, and a teacher of block_growth\.anchor gives a position one target",
        ),
    ],
)
def test_anchors_that_cannot_teach_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        run(block_growth=ANCHORED, **changes)


def test_a_resumed_run_needs_its_anchor(tmp_path):
    config = run(block_growth=ANCHORED, name="r", output_dir=str(tmp_path))
    _check_anchor(config, RunState(block_size=4))
    with pytest.raises(ConfigError, match=r"block-4', the student of the smaller blocks that teaches from then on"):
        _check_anchor(config, RunState(block_size=8))


def test_growth_must_multiply_the_block():
    for sizes in ([6], [4], [8, 12]):
        with pytest.raises(ValidationError, match="no larger multiple"):
            run(block_growth={"kind": "plateau", "sizes": sizes})
    with pytest.raises(ValidationError, match="differ in length"):
        run(block_growth={"kind": "steps", "sizes": [8], "at_batches": [1, 2]})


HELD_OUT = {"held_out_prompts": 8, "every_batches": 1}


def gated(schedule: str, **changes) -> RunConfig:
    curriculum = {"schedule": schedule, "min_tokens": 16, "max_tokens": 64, "gate_nats": 0.2, "step_tokens": 20}
    return run(curriculum=curriculum | changes, evaluation=HELD_OUT)


def limits(config: RunConfig, divergences: list[float], entropies: list[float]) -> list[int]:
    """The limit after each measurement of what the gate looks at; what it does not look at is told 100 times too."""
    feedback, found = Feedback(), []
    for divergence, entropy in zip(divergences, entropies, strict=True):
        if config.curriculum.gate_on == "held_out":
            feedback.after_batch(config, 100 * divergence, 100 * entropy)
            feedback.after_evaluation(config, 4, divergence, entropy, None)
        else:
            feedback.after_evaluation(config, 4, 100 * divergence, 100 * entropy, None)
            feedback.after_batch(config, divergence, entropy)
        found.append(response_limit(config.curriculum, 7, 4, feedback.gates))
    return found


LOW, HIGH = 0.1, 0.2  # below the level, and at it


@pytest.mark.parametrize("gate_on", ["held_out", "training"])
@pytest.mark.parametrize("schedule", ["kl_gated", "entropy_gated"])
@pytest.mark.parametrize("opens", ["above", "below"])
def test_all_four_cells_of_gates(gate_on, schedule, opens):
    config = gated(schedule, gate_on=gate_on, gate_opens=opens, gate_closed="wait")
    shut, wide = (LOW, HIGH) if opens == "above" else (HIGH, LOW)
    measured, other = [shut, wide, shut, wide, wide, wide], [wide, shut, wide, shut, shut, shut]
    order = (measured, other) if schedule == "kl_gated" else (other, measured)
    assert limits(config, *order) == [16, 36, 36, 56, 64, 64]


def test_the_defaults_are_the_papers_direction_for_entropy_and_progress_for_the_divergence():
    """2605.16826: the limit grows only while the held-out entropy is at least H_min, else it stays at the last stable
    length. A divergence is high at first, so its gate waits until it is low."""
    assert limits(gated("entropy_gated"), [9.0] * 6, [HIGH, HIGH, LOW, HIGH, HIGH, HIGH]) == [36, 56, 36, 36, 36, 36]
    assert limits(gated("kl_gated"), [HIGH, LOW, HIGH, LOW], [9.0] * 4) == [16, 36, 36, 56]


def test_a_ladder_that_never_opened_stays_at_its_foot():
    assert limits(gated("entropy_gated"), [9.0] * 3, [LOW, HIGH, HIGH]) == [16, 16, 16]


@pytest.mark.parametrize("field", ["held_out_prompts", "every_batches"])
def test_a_held_out_gate_needs_its_measurements(field):
    curriculum = {"schedule": "entropy_gated", "min_tokens": 16, "max_tokens": 64}
    with pytest.raises(ValidationError, match=rf"evaluation\.{field} is 0; set evaluation\.{field} to e\.g\. "):
        run(curriculum=curriculum, evaluation=HELD_OUT | {field: 0})
    run(curriculum=curriculum | {"gate_on": "training"})


def test_threshold_is_held_and_then_ramped():
    config = RolloutConfig(threshold_ramp={"end": 0.7, "hold_batches": 10, "ramp_batches": 4})
    assert [unmasking_at(config, b).threshold for b in (0, 10, 11, 12, 14, 99)] == [0.9, 0.9, 0.85, 0.8, 0.7, 0.7]
    with pytest.raises(ValidationError, match="the rule is 'static'"):
        RolloutConfig(unmasking={"rule": "static"}, threshold_ramp={"end": 0.7})
