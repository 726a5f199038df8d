"""The run's metrics: one registry of names, units and meanings."""

from __future__ import annotations

from dataclasses import dataclass

from common.config.objective import MOST_EXTRA


@dataclass(frozen=True)
class MetricSpec:
    """`optional`: null in a row where it was not measured, and then absent from the TensorBoard events."""

    unit: str
    meaning: str
    optional: bool = False


def _evaluated(unit: str, meaning: str) -> MetricSpec:
    return MetricSpec(unit, f"{meaning}; held-out problems, greedy dynamic decoding", optional=True)


def _held_out_kl(of: str) -> MetricSpec:
    return MetricSpec(
        "nats/token", f"KL(original || student), {of}; held-out prompts, blocks masked whole", optional=True
    )


def _of_parts() -> dict[str, MetricSpec]:
    """The losses of a sum (objective.extra) by their number; 0 is the main one, whose divergence is `kl`."""
    found = {}
    for i in range(MOST_EXTRA + 1):
        name = f"loss {i} of objective.extra" if i else "the main loss"
        found[f"part/{i}/loss"] = MetricSpec("nats", f"{name} as it counts in `loss`", optional=True)
        if i:
            found[f"part/{i}/kl"] = MetricSpec("nats/token", f"mean divergence of {name}", optional=True)
    return found


PARTS = _of_parts()

METRICS: dict[str, MetricSpec] = {
    "batch": MetricSpec("", "rollout batch, from 0"),
    "epoch": MetricSpec("", "passes over the prompts done after this batch, with fraction"),
    "time": MetricSpec("s", "Unix time at which the batch was logged"),
    "loss": MetricSpec("nats", "normalised objective, mean over the batch's updates"),
    "kl": MetricSpec("nats/token", "divergence from the teacher, mean over trained positions"),
    "teacher_agreement": MetricSpec("share", "trained positions where both have the same most likely token"),
    **PARTS,
    "trusted_share": MetricSpec(
        "share", "trained positions in the trust region; where objective.outliers is not none", optional=True
    ),
    "grad_norm": MetricSpec("", "global gradient norm before clipping, mean over updates"),
    "lr": MetricSpec("", "learning rate of the last update"),
    "tokens_per_step": MetricSpec("tokens", "response tokens per denoising forward of a sequence, in rollouts"),
    "offline_share": MetricSpec("share", "trajectories that are offline responses, not rollouts"),
    "share_eos": MetricSpec("share", "trajectories that end with the end token"),
    "response_length": MetricSpec("tokens", "mean response length"),
    "response_limit": MetricSpec("tokens", "response length limit of the curriculum"),
    "block_size": MetricSpec("tokens", "tokens per block in the rollouts"),
    "confidence_threshold": MetricSpec("", "threshold of dynamic unmasking in the rollouts; 0: another rule"),
    "response_tokens": MetricSpec("tokens", "response tokens so far, of rollouts and offline responses"),
    "trained_positions": MetricSpec("tokens", "masked positions in the loss of this batch"),
    "updates": MetricSpec("", "optimiser updates so far"),
    "nonfinite_updates": MetricSpec("", "updates so far that were left out, for a loss or gradient that is not finite"),
    "weights_version": MetricSpec("", "version published after this batch"),
    "staleness": MetricSpec("versions", "learner version minus the oldest version in the batch when trained"),
    "rollout/tokens_per_second": MetricSpec("tokens/s", "response tokens per busy second of the slowest actor"),
    "rollout/slots_in_use": MetricSpec(
        "share", "slots of the rollout actors with a running sequence, mean over the time of the batch's rollouts"
    ),
    "teacher/tokens_per_second": MetricSpec("tokens/s", "prompt and response tokens read per busy second"),
    "learner/tokens_per_second": MetricSpec("tokens/s", "packed tokens, clean and noised, per training second"),
    "queue/rollout": MetricSpec("trajectories", "admitted at the start of the batch"),
    "queue/teacher": MetricSpec("record batches", "most that waited for targets at once"),
    "queue/learner": MetricSpec("record batches", "handed to the learner"),
    # shares of a batch's wall time, see deploy/monitoring/occupancy.py
    "busy/rollout": MetricSpec("share", "wall time in which a rollout actor generates, mean over actors"),
    "waiting/rollout": MetricSpec("share", "wall time in which a rollout actor waits for others of the batch"),
    "blocked/rollout": MetricSpec("share", "wall time in which the staleness bound holds rollouts back"),
    # a run without teacher processes (hard labels, teacher.backend self) has no shares of theirs
    "busy/teacher": MetricSpec(
        "share", "wall time in which a teacher computes targets, mean over teachers", optional=True
    ),
    "waiting/teacher": MetricSpec("share", "wall time in which a teacher waits for rollouts under way", optional=True),
    "blocked/teacher": MetricSpec(
        "share", "wall time in which no rollouts are under way for the teacher", optional=True
    ),
    "busy/learner": MetricSpec("share", "wall time in which the learner trains"),
    "waiting/learner": MetricSpec("share", "wall time in which the learner waits for the batch to be complete"),
    "blocked/learner": MetricSpec("share", "wall time in which the learner publishes and waits for loading"),
    "overhead": MetricSpec(
        "share", "wall time in which no actor computes, publishes or loads: Ray, Arrow, control loop"
    ),
    "seconds/rollout": MetricSpec("s", "busy seconds of the busiest rollout actor"),
    "seconds/teacher": MetricSpec("s", "busy seconds of the busiest teacher"),
    "seconds/learner": MetricSpec("s", "training seconds"),
    # parts of seconds/learner on rank 0, see learner/phase_clock.py
    "learner/read_s": MetricSpec("s", "record batches read from the object store"),
    "learner/pack_s": MetricSpec("s", "updates packed into micro-batches"),
    "learner/copy_s": MetricSpec("s", "micro-batches, masks and targets made on the device"),
    "learner/forward_s": MetricSpec("s", "forwards with the loss"),
    "learner/backward_s": MetricSpec("s", "backwards"),
    "learner/optimizer_s": MetricSpec("s", "gradient norm, optimiser step, new weights"),
    "learner/sums_s": MetricSpec("s", "loss sums added over ranks and read"),
    "seconds/publish": MetricSpec("s", "gathering, shipping and, at staleness 0, loading the weights"),
    "seconds/weights_pause": MetricSpec(
        "s", "longest that a rollout actor stood still for new weights since its last rollouts"
    ),
    "seconds/batch": MetricSpec("s", "wall time of the batch, to its last weights loaded, from that of the one before"),
    "bytes/trajectories": MetricSpec("bytes", "Arrow record batches with targets"),
    "bytes/weights": MetricSpec("bytes", "published weights"),
    # how they are counted: deploy/run_cost.py
    "flops/rollout": MetricSpec("FLOPs", "sampling so far: 2 a parameter and token row of prefills, steps and commits"),
    "flops/teacher": MetricSpec("FLOPs", "targets so far: 2 a parameter and response token"),
    "flops/learner": MetricSpec("FLOPs", "training so far: 6 a parameter and response token; 4 where it is frozen"),
    "restarts/rollout": MetricSpec("", "rollout actors replaced so far, because they died, failed or hung"),
    "restarts/teacher": MetricSpec("", "teachers replaced so far"),
    "restarts/learner": MetricSpec("", "restarts of the learner's ranks so far"),
    "set_aside": MetricSpec("prompts", "prompts left out so far, because processes failed on them"),
    "seconds/repair": MetricSpec("s", "from the last fault to its repair; 0: none so far"),
    "gpu_hours": MetricSpec("h", "reserved GPUs times the wall time of all batches so far"),
    "eval/exact_match": _evaluated("share", "problems answered correctly"),
    "eval/tokens_per_step": _evaluated("tokens", "response tokens per denoising forward of a sequence"),
    "eval/forwards_per_token": _evaluated("forwards", "denoising forwards per response token"),
    "eval/forwards_per_token_with_commits": _evaluated("forwards", "denoising and commit forwards per response token"),
    "eval/response_length": _evaluated("tokens", "mean response length"),
    "eval/share_eos": _evaluated("share", "responses that ended with the end token"),
    "eval/tokens_per_second": _evaluated("tokens/s", "response tokens per busy second of one rollout actor"),
    "eval/held_out_kl": _held_out_kl("mean over the offsets in a block"),
    "eval/held_out_kl_1": _held_out_kl("first token of a block"),
    "eval/held_out_kl_2": _held_out_kl("second token of a block"),
    "eval/held_out_kl_3": _held_out_kl("third token of a block"),
    "eval/held_out_kl_4": _held_out_kl("fourth token of a block"),
    "eval/held_out_entropy": MetricSpec(
        "nats/token", "the student's entropy, at the tokens and averaged as eval/held_out_kl", optional=True
    ),
    "eval/held_out_accepted": MetricSpec(
        "share", "drafted tokens that verified decoding would keep, were the original the verifier", optional=True
    ),
    "seconds/evaluation": MetricSpec("s", "wall time of the evaluation, not part of seconds/batch", optional=True),
}
