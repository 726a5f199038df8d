"""The identity of a training: what it counts, and what it leaves out."""

from __future__ import annotations

import pytest

from common.config.file import load_config
from common.config.fingerprint import changes_training, differences, evaluation_fingerprint, fingerprint
from common.config.run import RunConfig

TINY = load_config("tiny")


@pytest.mark.parametrize(
    "override",
    [
        ("--learner.lr", "1e-3"),
        ("--pipeline.staleness", "1"),
        ("--pipeline.max_batches", "10"),
        ("--rollout.unmasking.threshold", "0.8"),
        ("--rollout.unmasking.rule", "static"),
        ("--rollout.unmasking.rule", "entropy_bound"),
        ("--objective.divergence.kind", "reverse_kl"),
        ("--data.domain_max_tokens", "{math: 16}"),
        ("--evaluation.held_out_prompts", "8"),
        ("--seed", "1"),
    ],
)
def test_what_changes_the_training_changes_the_fingerprint(override: tuple[str, str]) -> None:
    changed = load_config("tiny", list(override))
    assert fingerprint(changed) != fingerprint(TINY)
    assert any(
        line.startswith(override[0].removeprefix("--").rpartition(".")[0]) for line in differences(TINY, changed)
    )


@pytest.mark.parametrize(
    "override",
    [
        ("--name", "other"),
        ("--output_dir", "elsewhere"),
        ("--rollout.actors", "1"),
        ("--rollout.resources.cpus", "0.5"),
        ("--learner.max_tokens_per_microbatch", "2048"),
        ("--pipeline.checkpoint_every_batches", "3"),
        ("--publish.bucket_mib", "1"),
        ("--evaluation.count", "3"),
        ("--evaluation.held_out_tokens", "64"),
        ("--ray.num_cpus", "2"),
        ("--wandb.project", "p"),
    ],
)
def test_what_only_runs_it_otherwise_does_not(override: tuple[str, str]) -> None:
    changed = load_config("tiny", list(override))
    assert fingerprint(changed) == fingerprint(TINY)
    assert differences(TINY, changed) == []


def test_choices_whose_fields_are_all_defaults_differ() -> None:
    kinds = [
        load_config("tiny", ["--rollout.unmasking.rule", rule]) for rule in ("static", "sequential", "entropy_bound")
    ]
    assert len({fingerprint(config) for config in kinds}) == 3


def test_a_field_written_out_with_its_default_counts_as_left_out() -> None:
    assert fingerprint(load_config("tiny", ["--learner.weight_decay", "0.0"])) == fingerprint(TINY)


def test_differences_give_both_values() -> None:
    assert differences(TINY, load_config("tiny", ["--learner.lr", "1e-3"])) == ["learner.lr was 0.0006 and is 0.001"]


def test_the_evaluation_has_an_identity_of_its_own() -> None:
    assert evaluation_fingerprint(TINY) == evaluation_fingerprint(
        load_config("tiny", ["--evaluation.every_batches", "3"])
    )
    assert evaluation_fingerprint(TINY) != evaluation_fingerprint(load_config("tiny", ["--evaluation.count", "3"]))


def test_what_is_held_out_counts_in_the_evaluation_only_where_something_is() -> None:
    some, other = (
        load_config("tiny", ["--evaluation.held_out_prompts", "8", "--evaluation.held_out_tokens", tokens])
        for tokens in ("256", "64")
    )
    assert len({evaluation_fingerprint(config) for config in (TINY, some, other)}) == 3
    without = load_config("tiny", ["--evaluation.held_out_tokens", "64"])
    assert evaluation_fingerprint(without) == evaluation_fingerprint(TINY)


def test_fields_without_a_mark_change_the_training() -> None:
    fields = RunConfig.model_fields
    assert changes_training(fields["learner"]) and not changes_training(fields["wandb"])
