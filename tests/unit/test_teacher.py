"""The teacher: the transformers backend against a loop over positions, and the actor that batches for it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import actors.teacher.actor
import actors.teacher.transformers_backend
from actors.teacher.actor import TeacherActor, annotate, build_backend
from actors.teacher.targets import (
    LEAST_TAIL_MASS,
    HiddenTargets,
    TargetRequest,
    Targets,
    TeacherBackend,
    TopkTargets,
    log_tail_mass,
)
from common.config.resources import Resources
from common.config.teacher import TeacherConfig
from common.student import lm_head_weight, load_model
from common.trajectory import Trajectory, TrajectoryMeta, from_batch, to_batch
from tests.models import tiny_qwen3

pytestmark = pytest.mark.timeout(120)

META = TrajectoryMeta(block_size=4, mask_token_id=259, tokenizer_fingerprint="tiny")
LENGTHS = (2, 30, 7, 64, 1, 19)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_qwen3(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def log_softmax(path: str) -> Any:
    """ids -> float64 [V]: the log-probabilities of the next token, from one forward without any batching."""
    model = load_model(path, torch.float64, "eager")

    def of(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, -1]
        return logits.log_softmax(-1).numpy()

    return of


def config(target: str = "topk", **changes: Any) -> TeacherConfig:
    values = {"backend": "transformers", "target": target, "dtype": "float32", "max_batched_tokens": 80}
    return TeacherConfig(**{**values, **changes})


def requests(seed: int = 0) -> list[TargetRequest]:
    rng = np.random.default_rng(seed)
    made = []
    for length in LENGTHS:
        count = rng.integers(1, length + 1)
        positions = np.sort(rng.choice(np.arange(1, length + 1), count, replace=False))
        made.append(TargetRequest(rng.integers(0, 288, length).astype(np.int32), positions))
    return made


def trajectory(ordinal: int, offsets: Sequence[int], prompt: int = 6, response: int = 9) -> Trajectory:
    rng = np.random.default_rng(ordinal)
    tail = 4 - (prompt + response) % 4
    return Trajectory(
        ordinal=ordinal,
        sample=0,
        prompt_ids=rng.integers(0, 256, prompt).astype(np.int32),
        response_ids=rng.integers(0, 256, response).astype(np.int32),
        tail_ids=np.full(tail, 3, np.int32),
        reveal_round=np.zeros(response + tail, np.int16),
        confidence=np.ones(response + tail, np.float32),
        weights_version=0,
        finish_reason="eos",
        denoise_forwards=1,
        commit_forwards=1,
        target_offsets=np.array(offsets, np.int32),
    )


def test_topk_equals_a_loop_over_positions(path: str, log_softmax: Any) -> None:
    asked = requests()
    for request, targets in zip(asked, build_backend(config(), path).targets(asked), strict=True):
        assert isinstance(targets, TopkTargets)
        assert (targets.ids.dtype, targets.logprobs.dtype, targets.log_tail_mass.dtype) == (
            np.int32,
            np.float32,
            np.float32,
        )
        for row, position in enumerate(request.positions):
            exact = log_softmax(request.ids[:position])
            best = np.argsort(exact)[::-1]
            assert targets.ids[row].tolist() == best[:16].tolist()
            np.testing.assert_allclose(targets.logprobs[row], exact[best[:16]], atol=1e-4)
            tail_mass = np.exp(exact[best[16:]]).sum()
            np.testing.assert_allclose(np.exp(targets.log_tail_mass[row]), tail_mass, atol=1e-5)


def test_hidden_times_head_equals_a_loop_over_positions(path: str, log_softmax: Any) -> None:
    asked = requests()
    head = lm_head_weight(load_model(path, torch.float32, "sdpa")).detach().numpy()
    for request, targets in zip(asked, build_backend(config("hidden"), path).targets(asked), strict=True):
        assert isinstance(targets, HiddenTargets)
        assert targets.hidden.dtype == np.float32
        logits = torch.from_numpy(targets.hidden @ head.T)
        exact = [log_softmax(request.ids[:position]) for position in request.positions]
        np.testing.assert_allclose(logits.log_softmax(-1).numpy(), exact, atol=1e-4)


def test_bfloat16_hidden_travels_as_bits(path: str) -> None:
    asked = requests()
    exact = build_backend(config("hidden"), path).targets(asked)
    short = build_backend(config("hidden", dtype="bfloat16"), path).targets(asked)
    for a, b in zip(exact, short, strict=True):
        assert isinstance(a, HiddenTargets) and isinstance(b, HiddenTargets)
        assert b.hidden.dtype == np.uint16
        np.testing.assert_allclose(torch.from_numpy(b.hidden).view(torch.bfloat16).float().numpy(), a.hidden, atol=0.2)


def test_log_tail_mass_is_stable_and_finite() -> None:
    p = np.array([[0.5, 0.25], [1.0, 0.0], [0.6, 0.4 + 1e-6], [1 - 1e-9, 0.0]])
    with np.errstate(divide="ignore"):
        tail_mass = log_tail_mass(np.log(p))
    np.testing.assert_allclose(tail_mass[0], np.log(0.25), rtol=1e-6)
    np.testing.assert_allclose(tail_mass[1:3], np.log(LEAST_TAIL_MASS), rtol=1e-6)
    np.testing.assert_allclose(tail_mass[3], np.log(1e-9), rtol=1e-6)


def test_all_tokens_as_topk(path: str) -> None:
    (targets,) = build_backend(config(top_k=288), path).targets([TargetRequest(np.array([5]), np.array([1]))])
    assert isinstance(targets, TopkTargets)
    np.testing.assert_allclose(np.exp(targets.logprobs).sum(), 1.0, atol=1e-5)
    assert np.isfinite(targets.log_tail_mass).all()


def test_no_requests_and_no_positions(path: str) -> None:
    nothing = TargetRequest(np.array([1, 2], np.int32), np.empty(0, np.int32))
    some = TargetRequest(np.array([1, 2], np.int32), np.array([1], np.int32))
    topk = build_backend(config(), path)
    assert topk.targets([]) == []
    empty, full = topk.targets([nothing, some])
    assert isinstance(empty, TopkTargets) and isinstance(full, TopkTargets)
    assert (empty.ids.shape, empty.logprobs.shape, empty.log_tail_mass.shape) == ((0, 16), (0, 16), (0,))
    assert full.ids.shape == (1, 16)
    (hidden,) = build_backend(config("hidden", dtype="bfloat16"), path).targets([nothing])
    assert isinstance(hidden, HiddenTargets)
    assert (hidden.hidden.shape, hidden.hidden.dtype) == ((0, 64), np.uint16)


@pytest.mark.parametrize(
    ("ids", "position", "message"),
    [
        ([1, 2], 0, "positions"),
        ([1, 2], 3, "positions"),
        ([1, 288], 1, "vocabulary"),
        ([-1, 2], 1, "vocabulary"),
        ([1] * 513, 513, "teacher reads 512"),
    ],
)
def test_bad_requests_are_refused(path: str, ids: list[int], position: int, message: str) -> None:
    backend = build_backend(config(), path)
    with pytest.raises(ValueError, match=message):
        backend.targets([TargetRequest(np.array(ids, np.int32), np.array([position]))])


def test_impossible_configs_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="top_k"):
        build_backend(config(top_k=289), path)
    with pytest.raises(ValueError, match=r"teacher\.actors"):
        build_backend(config(resources=Resources(gpus=2)), path)


def test_annotate_asks_for_response_offsets(path: str, log_softmax: Any) -> None:
    asked, silent = trajectory(0, [0, 3, 8]), trajectory(1, [])
    annotate(build_backend(config(), path), [silent, asked])
    assert silent.topk_ids.size == silent.log_tail_mass.size == 0
    best = asked.topk_ids.reshape(3, 16)[:, 0].tolist()
    prefixes = [asked.causal_ids[: 6 + offset] for offset in (0, 3, 8)]
    assert best == [int(log_softmax(prefix).argmax()) for prefix in prefixes]
    assert asked.topk_logprobs.shape == (48,)
    assert asked.log_tail_mass.shape == (3,)


@pytest.mark.parametrize("target", ["topk", "hidden"])
def test_nothing_is_computed_or_shipped_for_positions_that_are_not_asked(
    path: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LM head sees the asked rows only, the layers no token behind the last of them, and the record batch that
    goes on holds as many targets as positions are trained."""
    backend = build_backend(config(target), path)
    head_rows, read = 0, 0

    def count_rows(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal read
        read += inputs[0].shape[:2].numel()

    def counted(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        nonlocal head_rows
        head_rows += len(hidden)
        return torch.nn.functional.linear(hidden, weight)

    monkeypatch.setattr(actors.teacher.transformers_backend, "linear", counted)
    backend.model.model.layers[0].register_forward_pre_hook(count_rows)
    asked, silent = trajectory(0, [1, 4]), trajectory(1, [])
    annotate(backend, [silent, asked])
    assert read == 6 + 4  # the prompt, and the response up to the token before the last asked one
    assert head_rows == (2 if target == "topk" else 0)
    shipped, _ = from_batch(to_batch([silent, asked], META))
    sizes = [[t.topk_ids.size, t.topk_logprobs.size, t.log_tail_mass.size, t.hidden.size] for t in shipped]
    assert sizes == [[0] * 4, [32, 32, 2, 0] if target == "topk" else [0, 0, 0, 2 * 64]]


def test_no_forward_or_product_grows_with_the_number_of_requests(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.teacher.transformers_backend, "LOGITS_ROWS", 16)
    largest: dict[str, int] = {}

    def counted(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        largest["head"] = max(largest.get("head", 0), len(hidden))
        return torch.nn.functional.linear(hidden, weight)

    def widest(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        largest["layers"] = max(largest.get("layers", 0), inputs[0].shape[:2].numel())

    monkeypatch.setattr(actors.teacher.transformers_backend, "linear", counted)
    backend = build_backend(config(), path)
    backend.model.model.layers[0].register_forward_pre_hook(widest)
    backend.targets(requests() * 8)
    assert largest["head"] <= 16
    assert largest["layers"] <= 80


@pytest.mark.parametrize("target", ["topk", "hidden"])
def test_batches_that_memory_does_not_hold_are_read_in_parts(path: str, target: str, monkeypatch: Any) -> None:
    whole = build_backend(config(target, max_batched_tokens=400), path).targets(requests())
    forward = actors.teacher.transformers_backend.causal_hidden_states

    def limited(model: Any, batch: Sequence[TargetRequest]) -> list[torch.Tensor]:
        if len(batch) * max(len(r.ids) for r in batch) > 70:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, batch)

    monkeypatch.setattr(actors.teacher.transformers_backend, "causal_hidden_states", limited)
    backend = build_backend(config(target, max_batched_tokens=400), path)
    for answer, expected in zip(backend.targets(requests()), whole, strict=True):
        for name, values in vars(expected).items():
            np.testing.assert_allclose(getattr(answer, name), values, atol=1e-5)
    notes = backend.take_notes()
    assert notes and all("teacher.max_batched_tokens is" in note for note in notes)
    backend.targets(requests())
    assert backend.take_notes() == [], "what fits is known"
    long = TargetRequest(np.zeros(80, np.int32), np.array([80]))
    with pytest.raises(torch.OutOfMemoryError, match="does not hold one sequence of 80 tokens: lower curriculum"):
        backend.targets([long])


def _annotated_together(actor: TeacherActor, batches: list[list[Trajectory]]) -> list[Any]:
    async def run() -> list[Any]:
        calls = [actor.annotate(to_batch(batch, META)) for batch in batches]
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


@pytest.mark.parametrize("target", ["topk", "hidden"])
def test_actor_merges_concurrent_requests(path: str, target: str) -> None:
    actor = TeacherActor(config(target), path)
    batches = [[trajectory(i, [0, i]), trajectory(100 + i, [2])] for i in range(8)] + [
        [],
        [trajectory(9, [])],
    ]
    answers = _annotated_together(actor, batches)
    backend = build_backend(config(target), path)
    for batch, answer in zip(batches, answers, strict=True):
        rows, meta = from_batch(answer)
        assert (meta.target_kind, meta.target_width) == (target, 16 if target == "topk" else 64)
        assert meta.hidden_dtype == "float32"
        annotate(backend, batch)
        for got, expected in zip(rows, batch, strict=True):
            assert got.ordinal == expected.ordinal
            np.testing.assert_array_equal(got.topk_ids, expected.topk_ids)
            np.testing.assert_allclose(got.hidden, expected.hidden, atol=1e-4)
    stats = actor.stats()
    # 30 tokens a request, 80 in a batch: two requests each
    assert (stats["sequences"], stats["tokens"], stats["batches"]) == (16, 240, 4)
    assert stats["queue_depth"] == stats["failed_requests"] == 0
    assert 0 < stats["busy_seconds"] < 60
    ready = actor.ready()
    assert (ready["vocab_size"], ready["backend"], ready["model_path"]) == (288, "transformers", path)
    asyncio.run(actor.close())


def _call(actor: TeacherActor, row: Trajectory) -> asyncio.Task[Any]:
    return asyncio.create_task(actor.annotate(to_batch([row], META)))


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_actor_waits_for_company(path: str) -> None:
    """Requests of 15 tokens, batches of 45, and a deadline that is far away: the third one completes a batch."""
    actor = TeacherActor(config(max_wait_ms=60_000, max_batched_tokens=45), path)

    async def run() -> None:
        calls = []
        for ordinal in range(3):
            assert (actor.stats()["queue_depth"], actor.stats()["batches"]) == (ordinal, 0)
            calls.append(_call(actor, trajectory(ordinal, [1])))
            await _until(lambda: len(actor.waiting) == len(calls))
        await asyncio.gather(*calls)

    asyncio.run(asyncio.wait_for(run(), 30))
    assert actor.stats()["batches"] == 1


def test_actor_does_not_wait_for_long(path: str) -> None:
    """Nothing comes that would complete a batch: who is there at the deadline is served, together or alone."""
    actor = TeacherActor(config(max_wait_ms=50), path)

    async def run() -> None:
        await asyncio.gather(*(_call(actor, trajectory(ordinal, [1])) for ordinal in range(2)))
        assert actor.stats()["batches"] == 1
        await _call(actor, trajectory(2, [1]))

    start = time.monotonic()
    asyncio.run(asyncio.wait_for(run(), 60))
    assert actor.stats()["batches"] == 2
    assert time.monotonic() - start > 0.09  # two deadlines


class _Picky(TeacherBackend):
    """Fails on every batch that holds a token 7."""

    def __init__(self) -> None:
        super().__init__("topk", 1, "float32", 288, 512)

    def _forward(self, requests: Sequence[TargetRequest]) -> list[Targets]:
        if any((r.ids == 7).any() for r in requests):
            raise MemoryError("token 7 is too much")
        one = np.zeros((1, 1))
        return [TopkTargets(one.astype(np.int32), one.astype(np.float32), one[0].astype(np.float32))] * len(requests)


def test_a_failure_reaches_only_the_request_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.teacher.actor, "build_backend", lambda *_: _Picky())
    actor = TeacherActor(config(max_batched_tokens=8192), "nowhere")
    batches = [[trajectory(i, [3])] for i in range(4)]
    for (row,) in batches:
        row.prompt_ids[:] = 7 if row.ordinal == 2 else 1
        row.response_ids[:] = 1
    answers = _annotated_together(actor, batches)
    assert [isinstance(a, Exception) for a in answers] == [False, False, True, False]
    assert "ordinals [2]: token 7 is too much" in str(answers[2])
    assert isinstance(answers[2].__cause__, MemoryError)
    stats = actor.stats()
    assert (stats["failed_requests"], stats["sequences"], stats["queue_depth"]) == (1, 3, 0)


class _Held(_Picky):
    """Answers when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Event(), threading.Event()

    def _forward(self, requests: Sequence[TargetRequest]) -> list[Targets]:
        self.entered.set()
        assert self.go.wait(60)
        return super()._forward(requests)


@pytest.mark.parametrize("while_it", ["waits for company", "is served"])
def test_a_cancelled_caller_does_not_hold_up_others(monkeypatch: pytest.MonkeyPatch, while_it: str) -> None:
    backend = _Held()
    monkeypatch.setattr(actors.teacher.actor, "build_backend", lambda *_: backend)
    actor = TeacherActor(config(max_wait_ms=60_000, max_batched_tokens=45), "nowhere")
    rows = [trajectory(i, [3]) for i in range(4)]
    for row in rows:
        row.prompt_ids[:] = row.response_ids[:] = 1

    async def run() -> None:
        leader, other = _call(actor, rows[0]), _call(actor, rows[1])
        await _until(lambda: len(actor.waiting) == 2)
        if while_it == "is served":
            third = _call(actor, rows[2])  # completes a batch
            await _until(backend.entered.is_set)
            leader.cancel()
            await asyncio.wait([leader])
            calls = [other, third]
        else:
            leader.cancel()
            await asyncio.wait([leader])
            calls = [other, _call(actor, rows[2])]
        backend.go.set()
        assert [answer.num_rows for answer in await asyncio.gather(*calls)] == [1, 1]
        assert leader.cancelled()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert actor.stats()["queue_depth"] == 0


def test_batches_with_targets_are_refused(path: str) -> None:
    actor = TeacherActor(config(), path)
    (annotated,) = _annotated_together(actor, [[trajectory(0, [1])]])
    with pytest.raises(ValueError, match="target_kind"):
        asyncio.run(actor.annotate(annotated))
