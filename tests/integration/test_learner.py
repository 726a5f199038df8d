"""The real learner: DeepSpeed ZeRO-3 ranks in Ray actors over gloo, against one plain PyTorch process."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import ray
import torch
from typer.testing import CliRunner

from common.config.objective import ObjectiveConfig
from common.config.run import RunConfig
from common.config.unmasking import DynamicUnmasking
from common.conversion import convert, load_converted
from common.seeds import state_rng
from common.states import select_states
from common.student import hidden_states, lm_head_weight, load_model, load_tokenizer
from common.trajectory import Trajectory, TrajectoryMeta, read_spool, to_batch
from common.vocabulary import tokenizer_fingerprint
from common.weights.object_store import ObjectStoreTransport
from common.weights.transport import load_weights
from deploy import cli
from learner import rank
from learner.batches import BatchBuilder
from learner.faults import FaultFolder
from learner.objective import ChunkedDivergence, empty_sums
from learner.replay import replay
from learner.schedule import RunUpdates
from learner.updater import MicroBatchTooLargeError
from tests.models import tiny_qwen3, tiny_tokenizer
from tests.unit.test_parity import set_targets, trajectories

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
BLOCK = 4


def config(path: str, ranks: int, deepspeed: dict) -> RunConfig:
    return RunConfig(
        block_size=BLOCK,
        model={"path": path},
        data={"prompts": "unused"},
        rollout={"dtype": "float32"},
        teacher={"target": "hidden", "dtype": "float32"},
        curriculum={"min_tokens": 8, "max_tokens": 16},
        learner={
            "ranks": ranks,
            "batch_rows": 4,
            "lr": 1e-2,
            "min_lr": 1e-3,
            "warmup_batches": 0,
            "dtype": "float32",
            "gradient_checkpointing": ranks == 2,
            "compile": True,  # on CPU nothing but the warm-up, which must change no number
            "max_tokens_per_microbatch": 128,
            "deepspeed": deepspeed,
            "resources": {"cpus": 0.5},
        },
    )


def rows_of(path: str) -> tuple[list[Trajectory], TrajectoryMeta]:
    model, tokenizer = load_model(path, torch.float32, "sdpa"), load_tokenizer(path)
    rows = trajectories(model, tokenizer, DynamicUnmasking(threshold=0.05))
    for t in rows:
        select_states(t, ObjectiveConfig(), BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 0))
    set_targets(model, rows)
    meta = TrajectoryMeta(
        BLOCK,
        tokenizer.mask_token_id,
        tokenizer_fingerprint(tokenizer),
        target_kind="hidden",
        target_width=model.config.hidden_size,
    )
    return rows, meta


def refs_of(path: str) -> list[ray.ObjectRef]:
    rows, meta = rows_of(path)
    return [ray.put(to_batch(rows[4:], meta)), ray.put(to_batch(rows[:4], meta))]


# a model this small is kept whole on every rank; a large one is gathered parameter by parameter
PARTITIONED = {"zero_optimization": {"stage3_model_persistence_threshold": 0, "stage3_param_persistence_threshold": 0}}


@pytest.mark.parametrize(
    ("ranks", "deepspeed"),
    [pytest.param(1, {}, marks=pytest.mark.long), (2, {}), (2, PARTITIONED)],
    ids=["1", "2", "2-partitioned"],
)
def test_ranks_train_publish_and_save_like_one_process(tmp_path, ray_local, ranks, deepspeed):
    path = tiny_qwen3(tmp_path / "model", seed=1)
    settings = config(path, ranks, deepspeed)
    rows, meta = rows_of(path)
    refs = [ray.put(to_batch(rows[4:], meta)), ray.put(to_batch(rows[:4], meta))]

    actors = [rank.as_remote(settings).remote(settings, i) for i in range(ranks)]
    address = ray.get(actors[0].address.remote())
    ray.get([a.start.remote(*address) for a in actors])
    spool = tmp_path / "spool" / "batch.arrow"
    results = ray.get([a.train.remote(refs, 0, RunUpdates(warmup=0, total=2), spool) for a in actors])
    handle = next(h for h in ray.get([a.publish.remote(7) for a in actors]) if h)
    ray.get([a.save.remote(tmp_path / "saved") for a in actors])
    ray.get([a.written.remote() for a in actors])

    reference = train_reference(settings, path, rows, meta)
    assert results[0]["loss"] == pytest.approx(reference, rel=1e-4)
    assert results[0]["updates"] == 2
    assert handle.version == 7
    published = load_model(path, torch.float32, "sdpa")
    load_weights(published, ObjectStoreTransport().fetch(handle))
    saved = load_model(str(tmp_path / "saved"), torch.float32, "sdpa")
    assert saved.config.mask_token_id == meta.mask_token_id
    assert saved.config.block_size == BLOCK
    for (name, a), b, trained in zip(
        published.named_parameters(), saved.parameters(), reference_model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        torch.testing.assert_close(a, trained, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert [b.num_rows for b in read_spool(spool)] == [4, 4]


def published_by(actors: list, path: str) -> dict[str, torch.Tensor]:
    handle = next(h for h in ray.get([a.publish.remote(1) for a in actors]) if h)
    model = load_model(path, torch.float32, "sdpa")
    load_weights(model, ObjectStoreTransport().fetch(handle))
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    "deepspeed", [pytest.param({}, marks=pytest.mark.long), PARTITIONED], ids=["whole", "partitioned"]
)
def test_what_a_checkpoint_resumes_is_equal_bit_by_bit(tmp_path, ray_local, deepspeed):
    """Training goes on while the shards are written, and does not reach into them."""
    path = tiny_qwen3(tmp_path / "model", seed=1)
    settings = config(path, 2, deepspeed)
    refs = refs_of(path)
    updates = RunUpdates(warmup=0, total=6)

    def trained(actors: list, first: int) -> dict[str, float]:
        results: list[dict[str, float]] = ray.get([a.train.remote(refs, first, updates) for a in actors])
        return {name: value for name, value in results[0].items() if not name.endswith(("seconds", "_s"))}

    first = started_ranks(settings)
    trained(first, 0)
    ray.get([a.save.remote(tmp_path / "saved", tmp_path / "resume") for a in first])
    results = [trained(first, 2), trained(first, 4)]
    ray.get([a.written.remote() for a in first])
    expected = published_by(first, path)
    for actor in first:
        ray.kill(actor)

    second = started_ranks(settings)
    ray.get([a.load.remote(tmp_path / "resume") for a in second])
    assert [trained(second, 2), trained(second, 4)] == results
    again = published_by(second, path)
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def started_ranks(settings: RunConfig, remote=rank.as_remote) -> list:
    actors = [remote(settings).remote(settings, i) for i in range(settings.learner.ranks)]
    address = ray.get(actors[0].address.remote())
    ray.get([a.start.remote(*address) for a in actors])
    return actors


class LimitedRank(rank.LearnerRank):
    """Memory of rank 1 runs out in the backward of micro-batches of more than `most` tokens, or of larger products with
    the LM head than `most_rows`."""

    most, most_rows = 70, 10_000

    def start(self, host: str, port: int) -> dict:
        facts = super().start(host, port)
        forward, backward = self.engine.forward, self.engine.backward

        def limited_forward(batch, sums, *, last):
            self.tokens = batch.tokens
            return forward(batch, sums, last=last)

        def limited_backward(loss):
            backward(loss)
            if self.rank == 1 and (self.tokens > self.most or self.engine.module.chunk > self.most_rows):
                raise torch.OutOfMemoryError("CUDA out of memory")

        self.engine.forward, self.engine.backward = limited_forward, limited_backward
        return facts


class RankOfOneTrajectory(LimitedRank):
    most, most_rows = 10_000, 100


@pytest.mark.parametrize("limited", [LimitedRank, pytest.param(RankOfOneTrajectory, marks=pytest.mark.long)])
def test_micro_batches_that_memory_does_not_hold_are_made_again_smaller(tmp_path, ray_local, limited):
    """The updates are those of ranks that hold them, up to rounding."""
    path = tiny_qwen3(tmp_path / "model", seed=1)
    settings = config(path, 2, {})
    refs, updates = refs_of(path), RunUpdates(warmup=0, total=2)
    whole = started_ranks(settings)
    expected = ray.get([a.train.remote(refs, 0, updates) for a in whole])[0]
    weights = published_by(whole, path)
    for actor in whole:
        ray.kill(actor)

    remote = partial(rank.as_remote, actor_class=limited)
    actors = started_ranks(settings, remote)
    results = ray.get([a.train.remote(refs, 0, updates) for a in actors])
    assert results[0]["warnings"] == []
    field = "max_tokens_per_microbatch" if limited is LimitedRank else "logits_chunk_rows"
    assert f"learner.{field} is" in results[1]["warnings"][-1]
    for name in ("loss", "kl", "grad_norm"):
        assert results[0][name] == pytest.approx(expected[name], rel=1e-5), name
    for name, tensor in published_by(actors, path).items():
        torch.testing.assert_close(tensor, weights[name], atol=2e-5, rtol=1e-4)


def test_ranks_that_wait_for_each_other_begin_anew_with_smaller_micro_batches(tmp_path, ray_local):
    """The rank says what to lower; ranks with that limit make the updates of ranks that hold all, up to rounding."""
    path = tiny_qwen3(tmp_path / "model", seed=1)
    settings = config(path, 2, PARTITIONED)
    refs, updates = refs_of(path), RunUpdates(warmup=0, total=2)
    whole = started_ranks(settings)
    expected = ray.get([a.train.remote(refs, 0, updates) for a in whole])[0]
    for actor in whole:
        ray.kill(actor)

    remote = partial(rank.as_remote, actor_class=LimitedRank)
    actors = started_ranks(settings, remote)
    with pytest.raises(ray.exceptions.RayTaskError, match="does not hold a micro-batch of") as raised:
        ray.get([a.train.remote(refs, 0, updates) for a in actors][1])
    for actor in actors:
        ray.kill(actor)
    error = raised.value.cause
    assert isinstance(error, MicroBatchTooLargeError)
    assert error.budget == "learner.max_tokens_per_microbatch" and error.value <= 64
    actors = started_ranks(settings, remote)
    ray.get([a.limit.remote({error.budget: error.value}) for a in actors])
    results = ray.get([a.train.remote(refs, 0, updates) for a in actors])[0]
    for name in ("loss", "kl", "grad_norm"):
        assert results[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize(
    "deepspeed", [{}, pytest.param(PARTITIONED, marks=pytest.mark.long)], ids=["whole", "partitioned"]
)
def test_an_update_that_is_not_finite_is_left_out_and_repeated_by_replay(tmp_path, ray_local, deepspeed):
    """A hidden state of the teacher so large that its logits overflow, then weights of the loss so large that the
    gradient does: the third update is made as if there had been no other."""
    path = tiny_qwen3(tmp_path / "model", seed=1)
    settings = config(path, 2, deepspeed)
    rows, meta = rows_of(path)
    updates = RunUpdates(warmup=0, total=3)
    third = [replace(t, ordinal=t.ordinal + 16) for t in rows[4:]]
    first = [replace(t, hidden=t.hidden.copy()) for t in rows[:4]]
    first[2].hidden[:] = 3e38
    second = [replace(t, ordinal=t.ordinal + 8) for t in rows[:4]]
    second[1].loss_weight = np.zeros_like(second[1].loss_weight)
    second[1].loss_weight[0] = 3e38

    alone = started_ranks(settings)
    expected = ray.get([a.train.remote([ray.put(to_batch(third, meta))], 2, updates) for a in alone])[0]
    weights = published_by(alone, path)
    for actor in alone:
        ray.kill(actor)

    actors = started_ranks(settings)
    refs = [ray.put(to_batch(part, meta)) for part in (first, second, third)]
    faults = FaultFolder(tmp_path / "faults", most=2)
    results = ray.get([a.train.remote(refs, 0, updates, faults=faults) for a in actors])
    assert [len(r["left_out"]) for r in results] == [2, 2]
    assert (results[0]["updates"], results[0]["loss"]) == (3, expected["loss"])
    assert results[0]["grad_norm"] == expected["grad_norm"]
    overflow, gradient = results[0]["left_out"]
    assert "update 0 is left out: the loss is nan, and" in overflow and f"{tmp_path}/faults/001" in overflow
    assert "update 1 is left out: the loss is" in gradient and "the gradient is not finite" in gradient
    assert all(torch.equal(tensor, weights[name]) for name, tensor in published_by(actors, path).items())

    found = replay(tmp_path / "faults" / "001")
    assert not found.whole.finite and found.weights == []
    assert [part.finite for _, part in found.rows] == [True, True, False, True]
    assert [t.ordinal for t, _ in found.rows] == [0, 1, 2, 3]
    found = replay(tmp_path / "faults" / "002")
    assert found.whole.bad == 0 and not np.isfinite(found.whole.grad_norm)
    assert [part.finite for _, part in found.rows] == [True, False, True, True]

    result = CliRunner().invoke(cli.app, ["replay", str(tmp_path / "faults" / "001" / "trajectories.arrow")])
    assert result.exit_code == 0 and "repeated: loss nan, gradient norm nan" in result.output, result.output

    with pytest.raises(ray.exceptions.RayTaskError, match="update 0 is left out: the loss is nan"):
        ray.get([a.train.remote(refs[:1], 0, updates) for a in actors])


class NotedGraphs(rank.LearnerRank):
    """Notes at each forward whether the LM head still has the gradient node that the micro-batch before has marked."""

    def start(self, host: str, port: int) -> dict:
        facts = super().start(host, port)
        forward, head, self.held = self.engine.forward, lm_head_weight(self.engine.student), []

        def node() -> Any:
            return head.view_as(head).grad_fn.next_functions[0][0]

        def noted_forward(batch, sums, *, last):
            self.held.append("marked" in node().metadata)
            loss = forward(batch, sums, last=last)
            node().metadata["marked"] = True
            return loss

        self.engine.forward = noted_forward
        return facts

    def noted(self) -> list[bool]:
        return self.held


def test_no_autograd_graph_outlives_its_micro_batch(tmp_path, ray_local):
    """On a GPU the layers of a new width are captured then; a node that is left from before is on another stream."""
    path = tiny_qwen3(tmp_path / "model", seed=1)
    (actor,) = started_ranks(config(path, 1, {}), partial(rank.as_remote, actor_class=NotedGraphs))
    ray.get(actor.train.remote(refs_of(path), 0, RunUpdates(warmup=0, total=2)))
    held = ray.get(actor.noted.remote())
    assert len(held) > 2 and not any(held)


class NotedGradients(rank.LearnerRank):
    """Keeps the gradients of its last update, float32 [parameters] one after another, and makes no step."""

    def start(self, host: str, port: int) -> dict:
        facts = super().start(host, port)

        def step() -> float:
            self.gradients = torch.cat([p.grad.flatten() for p in self.engine.student.parameters()])
            self.engine.discard()
            return self.gradients.norm().item()

        self.engine.step = step
        return facts

    def noted(self) -> torch.Tensor:
        return self.gradients.clone()


def test_a_sum_of_losses_has_the_gradient_of_the_single_losses(tmp_path, ray_local):
    """Rollouts, and beside them other masks of other responses: the learner of the sum, and one for each loss alone."""
    path = tiny_qwen3(tmp_path / "model", seed=1)
    model, tokenizer = load_model(path, torch.float32, "sdpa"), load_tokenizer(path)
    main, meta = rows_of(path)
    other = {"state": {"kind": "random"}, "divergence": {"kind": "jensen_shannon"}}
    objective = ObjectiveConfig(extra=[{**other, "weight": 0.3}])
    extra = trajectories(model, tokenizer, DynamicUnmasking(threshold=0.05), seed=8)
    for t in extra:
        t.sample = 1
        select_states(t, objective.parts[1], BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 1))
    teacher = load_model(tiny_qwen3(tmp_path / "teacher", seed=2), torch.float32, "sdpa")
    for rows in (main, extra):
        set_targets(teacher, rows)
    alone = [replace(t, sample=0) for t in extra[:4]]

    def made(rows: list[Trajectory], objective: ObjectiveConfig, *weights: float) -> tuple[dict, torch.Tensor]:
        settings = config(path, 1, {}).model_copy(update={"objective": objective})
        (actor,) = started_ranks(settings, partial(rank.as_remote, actor_class=NotedGradients))
        refs = [ray.put(to_batch(rows, meta))]
        metrics = ray.get(actor.train.remote(refs, 0, RunUpdates(warmup=0, total=1), extra_weights=weights))
        gradients = ray.get(actor.noted.remote())
        ray.kill(actor)
        return metrics, gradients

    metrics, together = made(main[:4] + extra[:4], objective, 0.3)
    of_main, main_gradients = made(main[:4], ObjectiveConfig())
    of_extra, extra_gradients = made(alone, ObjectiveConfig(**other))
    torch.testing.assert_close(together, main_gradients + 0.3 * extra_gradients, rtol=1e-4, atol=1e-6)
    assert 0.3 * extra_gradients.norm() > 0.01 * main_gradients.norm()
    assert metrics["part/0/loss"] == pytest.approx(of_main["loss"], rel=1e-6)
    assert metrics["part/1/loss"] == pytest.approx(0.3 * of_extra["loss"], rel=1e-6)
    assert metrics["part/1/kl"] == pytest.approx(of_extra["kl"], rel=1e-6)
    assert metrics["kl"] == pytest.approx(of_main["kl"], rel=1e-6)
    assert metrics["loss"] == pytest.approx(of_main["loss"] + 0.3 * of_extra["loss"], rel=1e-6)


def train_reference(settings: RunConfig, path: str, rows, meta) -> float:
    """The same two updates in plain PyTorch; the model is left in `reference_model`."""
    global reference_model
    reference_model = load_model(path, torch.float32, "sdpa")
    teacher_head = load_model(path, torch.float32, "sdpa").lm_head.weight.detach()
    build = BatchBuilder(meta, "row_mean", "bucket", 4096, "sdpa", torch.device("cpu"), teacher_head)
    optimizer = torch.optim.AdamW(reference_model.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    losses = []
    for update, lr in enumerate([1e-2, 1e-3 + 0.5 * 9e-3 * (1 + np.cos(np.pi / 2))]):
        part = rows[update * 4 : update * 4 + 4]
        (micro,), _ = build.update(part, 0, 1)
        x = build.tensors(micro, part)
        hidden = hidden_states(reference_model, x.ids, x.positions, x.mask)
        loss = ChunkedDivergence.apply(
            hidden.reshape(-1, hidden.shape[-1])[x.loss_index],
            reference_model.lm_head.weight,
            x.target,
            x.coefficient,
            settings.objective.divergence,
            1024,
            empty_sums(torch.device("cpu")),
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference_model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)], ids=["tied", "untied"])
def test_rows_added_for_the_mask_token_are_the_same_on_every_rank(tmp_path, ray_local, tied):
    """What two ranks publish and save before any update is what a rollout actor starts from."""
    path = tiny_qwen3(tmp_path / "model", tokenizer=tiny_tokenizer(), vocab=262, tied=tied)
    settings = config(path, 2, PARTITIONED)
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"mask_token": "new"})})
    actors = [rank.as_remote(settings).remote(settings, i) for i in range(2)]
    address = ray.get(actors[0].address.remote())
    ray.get([a.start.remote(*address) for a in actors])
    handle = next(h for h in ray.get([a.publish.remote(0) for a in actors]) if h)
    ray.get([a.save.remote(tmp_path / "saved") for a in actors])
    ray.get([a.written.remote() for a in actors])
    expected = load_converted(path, convert(path, BLOCK, "new"), torch.float32, "sdpa")
    published = load_converted(path, convert(path, BLOCK, "new"), torch.float32, "sdpa")
    with torch.no_grad():
        for parameter in published.parameters():
            parameter.zero_()
    load_weights(published, ObjectStoreTransport().fetch(handle))
    saved = load_model(str(tmp_path / "saved"), torch.float32, "sdpa")
    for (name, a), b, c in zip(expected.named_parameters(), published.parameters(), saved.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c), name
