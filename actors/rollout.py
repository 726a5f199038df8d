"""The rollout actor: one process that holds the student, generates trajectories and evaluates it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from queue import SimpleQueue
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.evaluation.autoregressive import evaluate_autoregressive, load_autoregressive
from actors.evaluation.evaluation import Evaluation, evaluate_shard
from actors.evaluation.held_out import HeldOutSums, HeldOutTargets, greedy_responses
from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from actors.weights_inbox import WeightsInbox
from common.busy import BusySpans, computes
from common.config.run import RunConfig
from common.config.unmasking import Unmasking
from common.conversion import counted_tokens, load_converted, student_of
from common.device import device_for
from common.lora import MergedWeights, add_adapters, load_adapters
from common.prompts import Prompt, longest_response, part_of
from common.ray_actor import as_ray_actor, own_address
from common.responses import offline_trajectory
from common.seeds import state_rng
from common.states import NoiseTokens, select_states
from common.trajectory import BatchInfo, Trajectory, TrajectoryMeta, batch_info, to_batch
from common.vocabulary import token_count, tokenizer_fingerprint
from common.weights.broadcast import BroadcastTransport, connect, stay_on
from common.weights.object_store import ObjectStoreTransport
from common.weights.transport import WeightsHandle, load_weights


class RolloutActor:
    """A Ray actor that samples trajectories with the weights version that it was last told to run.

    Life cycle: constructed with version 0, the ARLM's weights. `rollout` streams record batches of finished
    trajectories, their states selected. `fetch_weights` and `deal`, which brings it more prompts, run beside it in
    threads of their own; all other calls run one after the other, so `swap_weights` takes effect between two rollout
    batches:

        actor = as_remote(config).remote(config, 0)
        stream = actor.rollout.options(num_returns="streaming").remote(prompts, 64, 4, unmasking)
        items = [ray.get(ref) for ref in stream]              # made with version 0
        actor.fetch_weights.remote(handle)                    # of version 1
        assert ray.get(actor.swap_weights.remote(1)) == 1     # what is sampled from now on is made with version 1
    """

    def __init__(self, config: RunConfig, index: int) -> None:
        torch.set_num_threads(config.rollout.resources.threads)
        self.config = config
        self.index = index
        student = student_of(config)
        self.tokenizer, self.end_tokens = student.tokenizer, student.end_tokens
        device = device_for("rollout", config.rollout.resources)
        # decoding attends over a cache with a dense mask, whatever the learner's attention is
        model = load_converted(config.model.path, student, getattr(torch, config.rollout.dtype), "sdpa").to(device)
        model.requires_grad_(False)
        load = load_weights
        if config.adapter.gated:
            add_adapters(model, config.adapter)  # of version 0, whose update is 0
            load = load_adapters
        elif config.adapter.rank:
            load = MergedWeights(model, config.adapter).load
        self.meta = TrajectoryMeta(
            block_size=config.block_size,
            mask_token_id=student.config.mask_token_id,
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
        )
        self.noise = NoiseTokens(token_count(self.tokenizer), student.config.mask_token_id)
        self.sampler = Sampler(
            model,
            block_size=config.block_size,
            mask_token_id=student.config.mask_token_id,
            eos_token_id=self.end_tokens,
            token_count=token_count(self.tokenizer),
            slots=config.rollout.slots,
            seed=config.seed,
            max_batched_tokens=config.rollout.max_batched_tokens,
            longest=config.data.max_prompt_tokens + config.curriculum.max_tokens + config.block_size,
            cuda_graphs=config.rollout.cuda_graphs,
            compiled=config.rollout.compile,
        )
        self.sampler.slot_budget.name = "rollout.slots"
        self.sampler.prefill_budget.name = "rollout.max_batched_tokens"
        self.shared = ObjectStoreTransport(device, config.weights_timeout_s)
        self.inbox = WeightsInbox(self.shared, config.weights_timeout_s, load)
        # of a share, by its ordinals: for each teacher its rows and what it predicts there
        self.held_out: tuple[list[int], list[tuple[list[int], HeldOutTargets]]] = ([], [])
        self.busy_seconds = 0.0
        self.spans = BusySpans()
        self.tokens = 0
        self.token_rows = 0  # of rollouts, without evaluations, and so are
        self.slot_seconds = 0.0
        if self.sampler.on_cuda:  # while the other roles load
            rollout = config.rollout
            self.sampler.warm_up(Decoding(rollout.unmasking, rollout.temperature, rollout.top_k, rollout.top_p))
        self._dealt: dict[int | None, SimpleQueue[list[Prompt] | None]] = {}  # by rollout batch

    def ready(self) -> dict[str, Any]:
        return {
            "role": "rollout",
            "index": self.index,
            "pid": os.getpid(),
            "node": ray.util.get_node_ip_address(),
            "device": str(self.sampler.device),
            "weights_version": self.sampler.weights_version,
        }

    @ray.method(concurrency_group="weights")
    def join_weights_group(self, address: tuple[str, int], members: tuple[str, ...], rank: int) -> None:
        """Receive weights by broadcast from now on. Returns when all other members have joined too."""
        device, timeout = self.sampler.device, self.config.weights_timeout_s
        stay_on(own_address())
        store = connect(*address, timeout)
        self.inbox.transport = BroadcastTransport(store, members, rank, device, timeout)

    @ray.method(concurrency_group="weights")
    @computes
    def fetch_weights(self, handle: WeightsHandle) -> int:
        """Receive a published version while rollouts go on; returns its number. The version before must have been
        swapped in."""
        self.inbox.fetch(handle, self.shared if handle.is_shared else None)
        return handle.version

    @computes
    def swap_weights(self, version: int) -> int:
        """Run a version from now on, once it is fetched; returns its number as the acknowledgement."""
        self.inbox.swap(self.sampler.model, version)
        self.sampler.weights_version = version
        return version

    def weights_version(self) -> int:
        """The version that runs once all that was queued before is done."""
        return self.sampler.weights_version

    def set_block_size(self, block_size: int) -> None:
        """The block size of rollouts and evaluation from now on."""
        self.sampler.set_block_size(block_size)
        self.meta = replace(self.meta, block_size=block_size)

    def rollout(
        self,
        prompts: list[Prompt],
        max_new_tokens: int,
        block_size: int,
        unmasking: Unmasking,
        batch: int | None = None,
        longest: int = 0,
        keys: set[tuple[int, int]] | None = None,
        oldest: int = 0,
    ) -> Iterator[pa.RecordBatch | BatchInfo]:
        """Stream finished trajectories in record batches of `rollout.stream_rows` rows of one teacher, the last ones
        shorter; behind each record batch comes its BatchInfo.

        Prompts with offline responses take these and are not sampled; they come first.

        Args:
            batch: the rollout batch of which more prompts come by `deal`; None: these are all.
            longest: the longest possible x0 of those, in tokens.
            keys: the (ordinal, sample) of `prompts` that are made; None: all.
            oldest: the oldest weights version that may make them.

        Raises:
            ValueError: the weights are older, because newer ones could not be loaded.
        """
        if self.sampler.weights_version < oldest:
            raise ValueError(f"rollouts need weights version {oldest}, loaded is {self.sampler.weights_version}")
        rollout = self.config.rollout
        self.set_block_size(block_size)
        decoding = Decoding(unmasking, rollout.temperature, rollout.top_k, rollout.top_p)
        caps = self.config.data.domain_max_tokens
        parts = self.config.objective.parts

        def limit(prompt: Prompt) -> int:
            return longest_response(prompt, max_new_tokens, caps, block_size)

        def wanted(prompt: Prompt | Request, sample: int) -> bool:
            return keys is None or (prompt.ordinal, sample) in keys

        def requests(prompts: list[Prompt]) -> list[Request]:
            return [
                Request(p.ordinal, sample, p.ids, limit(p), p.domain)
                for p in prompts
                if not p.responses
                for sample in p.samples(rollout.samples_per_prompt)
            ]

        start = time.perf_counter()
        more: Callable[[bool], list[Request] | None] | None = None
        if batch is not None:
            dealt = self._deals(batch)

            def more(wait: bool) -> list[Request] | None:
                nonlocal start
                if wait:  # not busy meanwhile
                    self._was_busy(time.perf_counter() - start)
                came = dealt.get() if wait or not dealt.empty() else []
                start = time.perf_counter() if wait else start
                return None if came is None else requests(came)

        offline = (
            offline_trajectory(p, sample, limit(p), block_size, self.meta.mask_token_id, self.end_tokens)
            for p in prompts
            for sample in range(len(p.responses))
            if wanted(p, p.first_sample + sample)
        )
        first = [request for request in requests(prompts) if wanted(request, request.sample)]
        rows_before, slot_seconds_before = self.sampler.token_rows, self.sampler.slot_seconds
        pending: dict[int, list[Trajectory]] = {}  # by teacher
        for trajectory in chain(offline, self.sampler.generate(first, decoding, more, longest)):
            rng = state_rng(self.config.seed, trajectory.ordinal, trajectory.sample)
            objective = parts[part_of(trajectory.sample, rollout.samples_per_prompt)]
            select_states(trajectory, objective, block_size, self.end_tokens, rng, self.noise)
            of_teacher = pending.setdefault(self.config.teacher_of(trajectory.domain), [])
            of_teacher.append(trajectory)
            self.tokens += len(trajectory.response_ids)
            if len(of_teacher) >= rollout.stream_rows:
                self._was_busy(time.perf_counter() - start)
                yield from self._finished(of_teacher)
                of_teacher.clear()
                start = time.perf_counter()
        self._was_busy(time.perf_counter() - start)
        self.token_rows += self.sampler.token_rows - rows_before
        self.slot_seconds += self.sampler.slot_seconds - slot_seconds_before
        self._dealt.pop(batch, None)
        for rest in filter(None, pending.values()):
            yield from self._finished(rest)

    @ray.method(concurrency_group="deals")
    def deal(self, batch: int, prompts: list[Prompt] | None) -> None:
        """More prompts, none with offline responses, for rollouts of a batch, begun or not; None: these were all."""
        self._deals(batch).put(prompts)

    def _deals(self, batch: int) -> SimpleQueue[list[Prompt] | None]:
        return self._dealt.setdefault(batch, SimpleQueue())  # one step, since two threads come here

    def _was_busy(self, seconds: float) -> None:
        self.busy_seconds += seconds
        self.spans.add(seconds)

    def _finished(self, trajectories: list[Trajectory]) -> Iterator[pa.RecordBatch | BatchInfo]:
        batch = to_batch(trajectories, self.meta)
        yield batch
        yield batch_info(batch)

    def progress(self) -> int:
        """Passes so far."""
        return self.sampler.forwards

    def stats(self) -> dict[str, Any]:
        """Counters since the actor started; `tokens` are those of finished responses. `spans` says when it sampled or
        loaded weights since the last call (common/busy.py), and `warnings` what somebody should hear."""
        return {
            "pid": os.getpid(),
            "busy_seconds": self.busy_seconds,
            "spans": self.spans.take(),
            "tokens": self.tokens,
            "forwards": self.sampler.forwards,
            "token_rows": self.token_rows,
            "slot_seconds": self.slot_seconds,
            "weights_version": self.sampler.weights_version,
            "weights_pause_seconds": self.inbox.pause_seconds,
            "warnings": self.sampler.take_notes(),
        }

    def evaluate(
        self, problems: list[Prompt], unmasking: Unmasking, max_new_tokens: int, block_size: int
    ) -> Evaluation:
        """Greedy decoding of this actor's share of the held-out problems, with its current weights."""
        self.set_block_size(block_size)
        decoding = Decoding(unmasking, 0.0)
        answer_format = self.config.evaluation.answer_format
        return evaluate_shard(self.sampler, self.tokenizer, problems, decoding, max_new_tokens, answer_format)

    def evaluate_teacher(self, problems: list[Prompt], max_new_tokens: int) -> Evaluation:
        """Greedy autoregressive decoding of the same problems by the frozen ARLM, each by the one for its domain."""
        answer_format, whole = self.config.evaluation.answer_format, Evaluation()
        for path, rows in self._rows_by_teacher(problems, list(self.config.teacher_paths.values())).items():
            model, tokenizer = load_autoregressive(path, str(self.sampler.device), ends=self.end_tokens)
            own = [problems[row] for row in rows]
            whole += evaluate_autoregressive(model, tokenizer, own, max_new_tokens, answer_format=answer_format)
        return whole

    def answer_held_out(self, prompts: list[Prompt], max_new_tokens: int, teacher_paths: list[str]) -> list[np.ndarray]:
        """The frozen ARLM's greedy responses, int32, to this actor's share of the held-out prompts; of several ARLMs
        that for the prompt's domain."""

        def answer(original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[int]) -> list[np.ndarray]:
            return greedy_responses(original, tokenizer, [prompts[row] for row in rows], max_new_tokens)

        return self._read_held_out(prompts, teacher_paths, answer)

    def held_out_kl(
        self, prompts: list[Prompt], responses: list[np.ndarray], teacher_paths: list[str], block_size: int
    ) -> HeldOutSums:
        """The held-out KL of the current weights on this actor's share.

        What the frozen ARLM predicts there is kept from call to call; an actor that does not have it reads it first.
        """
        if self.held_out[0] != [p.ordinal for p in prompts]:
            self._read_held_out(prompts, teacher_paths, lambda _, __, rows: [responses[row] for row in rows])
        whole = HeldOutSums.zeros(len(prompts), block_size)
        # one forward of other shapes is not worth compiling for, nor the compiled passes' place in torch's cache
        with torch.compiler.set_stance("force_eager"):
            for rows, of_teacher in self.held_out[1]:
                whole.put(
                    rows,
                    of_teacher.sums(
                        self.sampler.model, block_size=block_size, mask_token_id=self.sampler.mask_token_id
                    ),
                )
        torch.cuda.empty_cache()  # of the ARLM and of logits: other roles may share the GPU
        return whole

    def _rows_by_teacher(self, prompts: list[Prompt], paths: list[str]) -> dict[str, list[int]]:
        """The rows of the prompts that each teacher is for, by its path."""
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(paths[self.config.teacher_of(prompt.domain)], []).append(row)
        return rows

    def _read_held_out(
        self,
        prompts: list[Prompt],
        paths: list[str],
        answer: Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[int]], list[np.ndarray]],
    ) -> list[np.ndarray]:
        """Keep what each ARLM predicts at its responses, which `answer` gives for the rows that are its own; returns
        the responses, int32, row by row."""
        responses: dict[int, np.ndarray] = {}
        targets = []
        for path, rows in self._rows_by_teacher(prompts, paths).items():
            original, tokenizer = self._original(path)
            responses |= zip(rows, answer(original, tokenizer, rows), strict=True)
            of_teacher = HeldOutTargets(
                original,
                [(prompts[row].ids, responses[row]) for row in rows],
                rows=self.sampler.model.config.vocab_size,
                tokens=counted_tokens(student_of(self.config), path),
            )
            targets.append((rows, of_teacher))
        self.held_out = [p.ordinal for p in prompts], targets
        return [responses[row] for row in range(len(prompts))]

    def _original(self, path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_autoregressive(path, str(self.sampler.device), self.config.teacher.dtype, self.end_tokens)


def as_remote(config: RunConfig) -> Any:
    return as_ray_actor(RolloutActor, config.rollout.resources, concurrency_groups={"weights": 1, "deals": 1})
