"""What the runs of the soak are, from their seeds: how each is made, and its faults."""

from __future__ import annotations

import random
from dataclasses import dataclass

BATCHES, PROMPTS, SAMPLES = 20, 8, 2
FAULTS = 10  # of a run
SLOW_SECONDS, SLOW_FOR = 0.3, 4.0
NODES_OF_RUN = {"raylets": 6, "network": 4}  # some spare
# of one process, from the median of a few batches, once the first are over, to that of its last few
WARM_BATCHES, MEDIAN_OF, GROWTH_MIB, GROWTH_HANDLES = 3, 3, 64.0, 24
ORDERS = "SOAK_ORDERS"  # environment: the folder with orders to the actors
ARGUMENTS = [
    "--pipeline.max_batches", str(BATCHES), "--rollout.prompts_per_batch", str(PROMPTS),
    "--rollout.samples_per_prompt", str(SAMPLES), "--rollout.stream_rows", "2", "--learner.warmup_batches", "1",
    "--pipeline.spool", "true", "--pipeline.checkpoint_every_batches", "2", "--evaluation.count", "8",
    "--evaluation.max_new_tokens", "16", "--evaluation.every_batches", "4", "--evaluation.teacher", "false",
    "--recovery.restarts", "1000",
]  # fmt: skip
WORK = {
    "loading": "loading models",
    "rollout": "generating",
    "teacher": "computing targets",
    "training": "training",
    "publishing": "publishing weights",
    "weights": "loading weights",
    "saving": "saving a checkpoint",
    "evaluating": "evaluating the student",
}
KINDS = ["kill", "kill", "kill", "stop", "pause", "raise", "slow"]
# where an actor takes the order to fail
RAISES = {
    "rollout": ["rollout", "weights", "evaluating", "loading"],
    "teacher": ["teacher", "loading"],
    "learner": ["training", "publishing", "saving", "loading"],
}
NETWORK_KINDS = ["network cut", "network slow", "network cut for seconds"]
# by the last digit of a seed
RUNS = ["vllm", "disk", "vllm", "loading", "", "", "vllm", "raylets", "network", "network"]
DRIVER_KINDS = ["driver killed", "checkpoint corrupted"]
NODES = "SOAK_NODES"  # environment: what is special about the run, its seed and its nodes


@dataclass
class Fault:
    """`seconds` from the fault to the first new work of what was replaced; None: nothing had to be. What was done again
    for it: rollout batches trained, trajectories asked of rollout actors."""

    kind: str
    role: str
    phase: str
    batch: int
    seconds: float | None = None
    batches_again: int = 0
    rollouts_again: int = 0


@dataclass(frozen=True)
class Plan:
    """A run: what is special about it (RUNS; often nothing), and its faults."""

    seed: int
    special: str
    staleness: int
    teachers: int
    faults: list[Fault]

    @property
    def nodes(self) -> int:
        return NODES_OF_RUN.get(self.special, 0)

    @property
    def backend(self) -> str:
        return "vllm" if self.special == "vllm" else "transformers"

    def arguments(self) -> list[str]:
        tokens = {"vllm": "2048", "transformers": "16"}[self.backend]  # one sequence a call, so that sums are the same
        cpus = "1" if self.special == "network" else "0.25"  # ranks on nodes of their own, or together
        return [
            *ARGUMENTS, "--pipeline.staleness", str(self.staleness), "--teacher.actors", str(self.teachers),
            "--teacher.backend", self.backend, "--teacher.max_batched_tokens", tokens, "--learner.resources.cpus", cpus,
        ]  # fmt: skip


def plan_of(seed: int, privileged: bool = True) -> Plan:
    """`privileged`: networks and disks may be made."""
    rng = random.Random(seed)
    special = RUNS[seed % 10]
    if special in ("network", "disk") and not privileged:
        special = ""
    staleness, teachers = (seed + seed // 10) % 2, 1 if special in ("network", "vllm") else rng.choice([1, 2])
    if special == "raylets":
        phases = ["rollout", "teacher", "training", "publishing", "weights"]
        faults = [Fault("raylet killed", "node", rng.choice(phases), batch) for batch in (1, 6, 11, 16)]
    elif special == "network":
        kinds = rng.sample(NETWORK_KINDS, len(NETWORK_KINDS))
        roles = rng.sample(["rollout", "teacher", "learner"], 3)
        phases = ["rollout", "teacher", "training", "publishing"]
        faults = [
            Fault(*pair, rng.choice(phases), batch) for *pair, batch in zip(kinds, roles, (2, 8, 14), strict=True)
        ]
    else:
        faults = [_fault(rng, special, batch) for batch in sorted(rng.sample(range(BATCHES - 1), FAULTS))]
    if special == "loading":
        faults = [Fault("kill", role, "loading", 0) for role in rng.sample(["rollout", "teacher", "learner"], 2)] + [
            Fault("driver killed", "driver", "loading", 0),
            *faults[3:],
        ]
    return Plan(seed, special, staleness, teachers, faults)


def _fault(rng: random.Random, special: str, batch: int) -> Fault:
    if special == "disk" and rng.random() < 0.4:
        return Fault("disk full", "driver", rng.choice(["rollout", "training", "saving"]), batch)
    if rng.random() < 0.1:
        return Fault(rng.choice(DRIVER_KINDS), "driver", rng.choice(["rollout", "training", "saving"]), batch)
    role, kind = rng.choice(["rollout", "rollout", "teacher", "learner"]), rng.choice(KINDS)
    if special == "loading" and rng.random() < 0.5:
        return Fault(rng.choice(["kill", "raise", "pause"]), role, "loading", batch)
    phases = [name for name in WORK if name != "loading"]
    return Fault(kind, role, rng.choice(RAISES[role] if kind == "raise" else phases), batch)
