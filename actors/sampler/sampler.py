"""The block-diffusion sampler: continuous batching over slots, cached blocks, commits without a forward of their own.

A pass is one forward of the current block of every running sequence, over its cached prefix. It samples a token for
every masked position and reveals those that the unmasking rule chooses. When a block is done, its clean tokens are
committed to the cache in the first pass of the next block: they are one more row of that forward, and do not see the
next block. A slot whose sequence has ended gets the next request before the next pass.

On CUDA a pass is launched before the host has read the result of the pass before it, so that the GPU does not wait for
the host. The host then has to guess how many commits and masked positions the pass has. Slots for which the guess
leaves no room wait for the next pass, and their trajectories stay the same. Admitting requests on the device would need
no guess, but the device would have to hold all prompts.

Prompts are cached in forwards of their own. Mixing them into passes, as serving engines do, was left out: a rollout's
prompts are short beside its responses, and the shapes of passes would no longer repeat.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.sampler.cache import CacheRows, SlotCache
from actors.sampler.cached_model import CachedModel
from actors.sampler.device_pass import DevicePass
from actors.sampler.graphs import PassGraphs
from actors.sampler.pass_plan import pass_rows
from actors.sampler.prefixes import PrefixCache
from actors.sampler.request import Request
from actors.sampler.request_queue import More, RequestQueue
from actors.sampler.sampling import Decoding
from actors.sampler.slots import SlotState, WrittenBlock
from actors.sampler.stop_strings import StopStrings
from actors.sampler.unmasking import revision, tokens_revealed, without_threshold
from actors.sampler.verifier import Verifier
from common.config.unmasking import SpeculativeUnmasking
from common.grid import grid_ceil
from common.memory_budget import MemoryBudget
from common.padded_batches import padded_batches
from common.seeds import stream_key
from common.trajectory import EndTokens, Trajectory

FEW_ROWS = 32  # passes of so few rows, or fewer, have room for all commits and masked positions
MOST_GRAPHED_DECODINGS = 16  # decoding settings whose passes are graphs: clients of a server may bring any number
MOST_GRAPHED_TOKENS = 4096  # of a prefill that is a graph: one of more keeps the GPU busy for longer than its launches


class Sampler:
    """Generates trajectories with the model's current weights.

    A trajectory depends on the weights, the decoding settings, its request and `seed`, and on nothing else: neither on
    the other requests and their order, nor on the number of slots (but for floating-point rounding).

    Life cycle: constructed on a loaded model, whose attention it replaces and, on CUDA, whose projections it packs.
    Then `generate`, any number of times, one call at a time. Between two calls the owner may copy new weights into the
    model, in place, and set `weights_version`, which every trajectory carries; set `seed`; or call `set_block_size`.
    A caller may leave `generate` before its end: the next call forgets what was running. The cache is kept from call
    to call and grows with the longest request; on CUDA it is made for x0 of `longest` tokens at once. `passes` is
    `generate` pass by pass; between two passes the caller may read what running sequences have written, and cancel
    some.

    Example, which prints responses as they end::

        from actors.evaluation.generation import load_student
        from common.prompts import prompt_ids

        model, tokenizer = load_student("runs/tiny/checkpoints/final", "float32")
        sampler = Sampler(
            model,
            block_size=model.config.block_size,
            mask_token_id=model.config.mask_token_id,
            eos_token_id=tokenizer.eos_token_id,
            slots=8,
            seed=0,
        )
        questions = ["Tom has 5 apples and buys 4 more. How many now?", "Ann has 9 pens and loses 2. How many now?"]
        requests = [Request(i, 0, prompt_ids(tokenizer, q), max_new_tokens=64) for i, q in enumerate(questions)]
        for trajectory in sampler.generate(requests, Decoding(temperature=0.0)):
            print(questions[trajectory.ordinal], tokenizer.decode(trajectory.response_ids))

    On CUDA a pass takes all slots, or when fewer run a half of them, a quarter and so on, so that its shapes repeat: it
    is compiled, and a CUDA graph from its second use on. On CPU it takes the running slots only. A prefill takes
    prompts of at most `max_batched_tokens` tokens together, padding included, or one longer prompt. Stop strings are
    looked for on the host after each block of a request that has some, and need the `tokenizer`. `forwards` counts the
    passes. `token_rows` counts the tokens computed for sequences that have ended: prompts in prefills, and B tokens for
    each denoising forward and each commit. `slot_seconds` adds up how long each slot had a running sequence.

    With `prefix_tokens`, keys and values of so many tokens are kept for later prompts that begin with them, prompts and
    responses alike (actors/sampler/prefixes.py); `known_tokens` counts those that prefills found there. They are
    forgotten when `weights_version` changes. Sequences that run meanwhile need `renew`.

    `verifier` is the original, for unmasking.verify 'base' (actors/sampler/verifier.py); memory for its cache is made
    beside the student's.
    """

    pass_class = DevicePass  # other samplers have passes of their own

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        block_size: int,
        mask_token_id: int,
        eos_token_id: EndTokens,
        token_count: int | None = None,
        slots: int,
        seed: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_batched_tokens: int = 16384,
        longest: int = 0,
        prefix_tokens: int = 0,
        cuda_graphs: bool = True,
        compiled: bool = True,
        verifier: PreTrainedModel | None = None,
    ) -> None:
        self.model = model
        self.longest = longest
        self.prefix_tokens = prefix_tokens
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.token_count = token_count
        self.slot_budget = MemoryBudget("slots", slots)
        self.seed = seed
        self.stops = StopStrings(tokenizer) if tokenizer else None
        self.prefill_budget = MemoryBudget("max_batched_tokens", max_batched_tokens)
        self.device = model.get_output_embeddings().weight.device
        self.on_cuda = self.device.type == "cuda"
        self.weights_version = 0
        self.forwards = self.token_rows = self.known_tokens = 0
        self.slot_seconds = 0.0
        self.ahead = int(self.on_cuda)  # passes in progress while the host reads an earlier one
        self.few_shapes = self.on_cuda  # passes and prefills are padded, so that few graphs serve all
        self._use_graphs = self.on_cuda and cuda_graphs
        self._cache: SlotCache | None = None
        self._prefixes: PrefixCache | None = None
        self._state: SlotState | None = None
        self._graphs: PassGraphs | None = None
        self._settings: dict[Decoding, Decoding] = {}
        self._graphed: set[Decoding] = set()
        self._together = 0  # tokens of several prompts that are being cached together
        on_device = self.on_cuda and compiled
        self.cached_model = CachedModel(model, on_device)
        self.verifier = Verifier(verifier, on_device) if verifier is not None else None
        self.device_pass = self.pass_class(
            self.cached_model, mask_token_id, eos_token_id, token_count, on_device, self.verifier
        )

    @property
    def slots(self) -> int:
        return self.slot_budget.value

    @property
    def causal(self) -> bool:
        """Whether the student's clean tokens see nothing behind them."""
        return self.cached_model.causal

    def take_notes(self) -> list[str]:
        """What was made smaller since the last call, since memory ran out; for whoever runs the sampler."""
        return self.slot_budget.take_notes() + self.prefill_budget.take_notes()

    def set_block_size(self, block_size: int) -> None:
        """Decode in blocks of this size from the next call on."""
        if block_size != self.block_size:
            self.block_size = block_size
            self._cache = self._state = self._prefixes = None

    def warm_up(self, decoding: Decoding) -> None:
        """Compile what `generate` with these settings needs, before there are prompts: on CUDA that takes most of the
        first batch's time where no earlier run has left compiled code. Counters and later trajectories stay as they
        would be without."""
        before = self.forwards, self.token_rows, self.slot_seconds
        prompt = np.zeros(2 * self.block_size + 1, np.int64)
        for _ in self.generate([Request(i, 0, prompt, 4 * self.block_size) for i in range(self.slots)], decoding):
            pass
        self.forwards, self.token_rows, self.slot_seconds = before

    def generate(
        self, requests: Iterable[Request], decoding: Decoding, more: More | None = None, longest: int = 0
    ) -> Iterator[Trajectory]:
        """Yield each trajectory as it ends; arguments and errors as in `passes`."""
        for ended in self.passes(requests, decoding, more, longest):
            yield from ended

    @torch.inference_mode()
    def passes(
        self, requests: Iterable[Request], decoding: Decoding, more: More | None = None, longest: int = 0
    ) -> Iterator[list[Trajectory]]:
        """Yield after every pass the trajectories that have ended; each counts the passes that it took part in.

        Where memory runs out, the sequences that are not finished begin anew, in fewer slots or with smaller prefills;
        their trajectories are the same, up to rounding (common/seeds.py).

        Args:
            decoding: of the requests that bring none.
            more: asked before every pass for requests that have come meanwhile.
            longest: the longest possible x0 of these, in tokens.

        Raises:
            FloatingPointError: the model gave a non-finite logit at a sampled position.
            torch.OutOfMemoryError: memory does not hold a single sequence.
            ValueError: a request has stop strings, and the sampler no tokenizer to find them with.
        """
        queue = RequestQueue(deque(requests), more)
        if not queue:
            return
        self._check_stops(queue.requests)
        # on CUDA new memory would discard all graphs, and the limit of responses grows during a run
        at_once = self.longest if self.few_shapes else 0
        longest = max([at_once, longest, *(self._end(r) for r in queue.requests)])
        if isinstance(decoding.unmasking, SpeculativeUnmasking):
            self._check_speculative(queue.requests, decoding.unmasking)
            longest += self.block_size  # the last block is verified while the one behind it is drafted
        while queue:
            self._together = 0
            try:
                yield from self._run(queue, longest, decoding)
            except torch.OutOfMemoryError as error:
                too_large = self.prefill_budget if self._together else self.slot_budget
                if not too_large.can_halve:
                    raise torch.OutOfMemoryError(
                        f"memory does not hold one sequence of {longest} tokens: lower curriculum.max_tokens or "
                        "data.max_prompt_tokens, or give the process another GPU"
                    ) from error
            else:
                return
            if self._state:
                queue.requests.extendleft(reversed(self._state.active.values()))
            self._state = self._cache = self._graphs = self._prefixes = None
            too_large.halve(most=self._together or None)
            if too_large is self.slot_budget:
                self.prefix_tokens //= 2  # kept prefixes take memory in proportion

    def attach(self) -> None:
        """Between two passes: another sampler of this model has run since."""
        if self._cache:
            self._cache.attach(self.model)
        if self.verifier:
            self.verifier.attach()

    @torch.inference_mode()
    def renew(self) -> None:
        """Between two passes, after new weights: what running sequences have written stays, and is cached anew, so that
        they go on as if the new weights had been given that much."""
        if not self._state or not self._cache:
            return
        slots = np.flatnonzero(self._state.running).tolist()
        if not slots:
            return
        self.attach()
        self._cache_tokens(self._state, slots, [0] * len(slots), self._state.committed_tokens(slots))

    @torch.inference_mode()
    def cancel(self, ordinals: Collection[int]) -> None:
        """Forget the running sequences of these requests; between two passes."""
        if self._state:
            self._state.drop([slot for slot, r in self._state.active.items() if r.ordinal in ordinals])

    @torch.inference_mode()
    def finished_blocks(self, ordinals: Collection[int]) -> list[WrittenBlock]:
        """Of these requests' running sequences the blocks that the last pass has finished; between two passes. They
        never change again. On CUDA a block may come twice."""
        return self._state.finished_blocks(self._slots_of(ordinals, self._state.advanced)) if self._state else []

    @torch.inference_mode()
    def current_blocks(self, ordinals: Collection[int]) -> list[WrittenBlock]:
        """The blocks that these requests' running sequences are at; between two passes."""
        return self._state.current_blocks(self._slots_of(ordinals, self._state.active)) if self._state else []

    def _slots_of(self, ordinals: Collection[int], slots: Iterable[int]) -> list[int]:
        active = self._state.active if self._state else {}
        return [slot for slot in slots if active[slot].ordinal in ordinals]

    def _check_stops(self, requests: Iterable[Request]) -> None:
        if self.stops is None and any(request.stop for request in requests):
            raise ValueError("requests with stop strings need a sampler with a tokenizer")

    def _check_speculative(self, requests: Iterable[Request], rule: SpeculativeUnmasking) -> None:
        if rule.verify == "base" and self.verifier is None:
            raise ValueError("unmasking.verify 'base' needs a sampler that was given the original as its verifier")
        if rule.verify == "self" and not self.causal:
            raise ValueError(
                "unmasking.rule 'speculative' needs a student with attention_context 'causal', this one's is 'block'"
            )
        if empty := [r.ordinal for r in requests if not len(r.prompt_ids)]:
            raise ValueError(
                f"unmasking.rule 'speculative' needs a token before the response: prompt {empty[0]} is empty"
            )

    def _run(self, queue: RequestQueue, longest: int, decoding: Decoding) -> Iterator[list[Trajectory]]:
        """Pass by pass the trajectories that have ended; requests are taken off the queue as slots get free. `longest`
        in tokens."""
        state, cache = self._memory(longest)
        then = time.perf_counter()
        while queue or state.active:
            queue.receive(idle=not state.active)
            if not queue.requests and not state.active:
                continue
            free = np.flatnonzero(~state.running).tolist() if queue.requests else []
            admitted = {slot: queue.requests.popleft() for slot in free[: len(queue.requests)]}
            if admitted:
                self._check_stops(admitted.values())
                asked = {slot: r.decoding or decoding for slot, r in admitted.items()}
                rules = {slot: without_threshold(d.unmasking) for slot, d in asked.items()}
                thresholds = [threshold for _, threshold in rules.values()]
                state.admit(admitted, self._keys(admitted), thresholds, self.mask_token_id, self._end)
                verified = {s: d.unmasking for s, d in asked.items() if isinstance(d.unmasking, SpeculativeUnmasking)}
                if verified:
                    rule = next(iter(verified.values()))
                    self._check_speculative(admitted.values(), rule)
                    state.verify([*verified], rule.verify == "base")
                if state.speculative.any() and not state.speculative[state.running].all():
                    raise ValueError("requests of unmasking.rule 'speculative' do not run beside those of other rules")
                for slot, d in asked.items():
                    state.decodings[slot] = self._same(state, replace(d, unmasking=rules[slot][0]))
                self._prefill(state, cache, admitted)
            in_use = int(state.running.sum())
            self._launch(state)
            ended: list[Trajectory] = []
            while len(state.in_progress) > self.ahead:
                slots = state.read()
                if self.stops:
                    slots = slots + state.stop(self.stops)
                taken = state.take(slots, self.eos_token_id, self.weights_version, self.stops)
                self._keep(state, cache, slots, taken)
                ended += taken
            for trajectory in ended:
                self.token_rows += self.block_size * (trajectory.denoise_forwards + trajectory.commit_forwards)
            yield ended
            now = time.perf_counter()
            self.slot_seconds += in_use * (now - then)
            then = now

    def _end(self, request: Request) -> int:
        """Length of the longest possible x0: whole blocks."""
        return grid_ceil(len(request.prompt_ids) + request.max_new_tokens, self.block_size)

    def _memory(self, length: int) -> tuple[SlotState, SlotCache]:
        """Slots and cache for sequences of `length`; kept from call to call, replaced when they are too short."""
        if self._state is None or self._cache is None or self._cache.length < length:
            self._state = self._cache = None
            capacity = grid_ceil(length, 128)
            self._cache = SlotCache(self.model, self.slots, capacity)
            if self.verifier:
                self.verifier.make_cache(self.slots, capacity)
            self._state = SlotState(self.slots, capacity, self.block_size, self.device)
            if self.prefix_tokens and not self._prefixes:
                self._prefixes = PrefixCache(self._cache, self.block_size, self.prefix_tokens, self.weights_version)
            self._graphs = PassGraphs() if self._use_graphs else None
        self.attach()  # another sampler of this model may have run since
        self._state.clear()  # an earlier caller may have left before the end
        return self._state, self._cache

    def _same(self, state: SlotState, decoding: Decoding) -> Decoding:
        """The object that stands for all equal settings: comparing those of all slots takes time in every pass."""
        if len(self._settings) > 2 * self.slots:  # clients of a server may bring any number
            self._settings = {d: d for d in state.decodings if d}
        return self._settings.setdefault(decoding, decoding)

    def _keys(self, admitted: dict[int, Request]) -> list[int]:
        return [stream_key(self.seed, r.ordinal, r.sample) if r.key is None else r.key for r in admitted.values()]

    def _prefill(self, state: SlotState, cache: SlotCache, admitted: dict[int, Request]) -> None:
        """Cache the complete prompt blocks of new sequences, once for all samples of a prompt."""
        samples: dict[bytes, list[int]] = {}
        for slot, request in admitted.items():
            if state.block_host[slot] > state.uncommitted_host[slot]:
                samples.setdefault(request.prompt_ids.tobytes(), []).append(slot)
        if not samples:
            return
        first = [group[0] for group in samples.values()]
        ends = [int(state.block_host[slot] - state.uncommitted_host[slot]) * self.block_size for slot in first]
        prompts = [(slot, admitted[slot].prompt_ids[:end]) for slot, end in zip(first, ends, strict=True)]
        prefixes = None if state.by_original else self._known_prefixes()  # none are kept of the original's
        for part in prefixes.waves(prompts) if prefixes else [prompts]:
            starts = prefixes.read(cache, part) if prefixes else [0] * len(part)
            self.known_tokens += sum(starts)
            self._cache_tokens(state, [slot for slot, _ in part], starts, [len(ids) for _, ids in part])
            if prefixes:
                prefixes.write(cache, part)
        copies = [(group[0], slot) for group in samples.values() for slot in group[1:]]
        if copies:
            source, target = state.upload(np.array(copies).T)
            for each in (cache, self.verifier and self.verifier.cache):
                if each:
                    each.copy(source, target, max(ends))

    def _known_prefixes(self) -> PrefixCache | None:
        """Those of the present weights."""
        if self._prefixes and self._prefixes.version != self.weights_version:
            self._prefixes.forget(self.weights_version)
        return self._prefixes

    def _keep(self, state: SlotState, cache: SlotCache, slots: list[int], taken: list[Trajectory]) -> None:
        """Keep what is cached of sequences that have just ended: all blocks but the last one, which no pass commits."""
        prefixes = None if state.by_original else self._known_prefixes()
        if not prefixes or not slots:
            return
        ends = (state.block_host[slots] * self.block_size).tolist()
        whole = (np.concatenate([t.prompt_ids, t.response_ids, t.tail_ids]) for t in taken)
        prefixes.write(cache, [(slot, ids[:end]) for slot, ids, end in zip(slots, whole, ends, strict=True)])

    def _cache_tokens(self, state: SlotState, slots: list[int], starts: list[int], ends: list[int]) -> None:
        """Cache the tokens from `starts` to `ends` of these slots, in as many forwards as memory asks for."""
        left = [i for i, (start, end) in enumerate(zip(starts, ends, strict=True)) if start < end]
        lengths = [ends[i] - starts[i] for i in left]
        self.token_rows += sum(lengths)
        for batch in padded_batches(lengths, self.prefill_budget.value):
            self._together = len(batch) * max(lengths[index] for index in batch) if len(batch) > 1 else 0
            which = [left[index] for index in batch]
            self._cache_together(state, [slots[i] for i in which], [starts[i] for i in which], [ends[i] for i in which])
        self._together = 0

    def _cache_together(self, state: SlotState, slots: list[int], starts: list[int], ends: list[int]) -> None:
        """One forward over the tokens from `starts` to `ends` of the sequences in `slots`."""
        count, width = len(slots), max(end - start for start, end in zip(starts, ends, strict=True))
        graphs = None
        if self.few_shapes and count * width <= MOST_GRAPHED_TOKENS:
            graphs = self._graphs
            count, width = max(_power_of_two(count), 2), min(_power_of_two(width), state.ids.shape[1])
        prompts = state.prompts_on_device(slots, starts, ends, count)
        readers = [self.cached_model]
        if self.verifier and state.by_original:
            readers.append(self.verifier.model)

        def device_pass() -> Tensor:
            rows, first, last = prompts
            positions = first[:, None] + torch.arange(width, device=self.device)
            positions = torch.where(positions < last[:, None], positions, -1)
            ids = state.ids[rows[:, None], positions.clamp(min=0)]
            for model in readers:
                cache_rows = CacheRows(rows, positions, self.block_size, causal=model.causal_from(0, count))
                hidden = model.forward(ids, positions, cache_rows)
            return hidden

        if graphs:
            graphs.run(("prompts", count, width, len(readers)), device_pass)
        else:
            device_pass()

    def _launch(self, state: SlotState) -> None:
        """Start a pass of all running sequences."""
        self.forwards += 1
        running = np.flatnonzero(state.running)
        decodings = state.running_decodings()
        revealed, exactly = zip(*(tokens_revealed(d.unmasking, self.block_size) for d in decodings), strict=True)
        commits, masked = state.expected(min(revealed), all(exactly) and min(revealed) == max(revealed))
        revises = any(revision(d.unmasking) for d in decodings)  # whole blocks are sampled
        masked = len(running) * self.block_size if revises else masked
        if not self.few_shapes:
            state.launched(running, self.device_pass(state, decodings, torch.from_numpy(running), commits, masked))
            return
        # few shapes, so that there are few graphs
        rows = pass_rows(state.running)
        count, positions = len(rows), len(rows) * self.block_size
        few = count <= FEW_ROWS  # these cost hardly more with room for all, and need one graph
        commits = count if few else _round_up(commits, -(-count // 4), count)
        masked = positions if few or revises else _round_up(masked, -(-positions // 8), positions)
        slots = state.rows_on_device(rows)

        def device_pass() -> Tensor:
            return self.device_pass(state, decodings, slots, commits, masked)

        graphed = len(decodings) == 1 and (decodings[0] in self._graphed or len(self._graphed) < MOST_GRAPHED_DECODINGS)
        if not (self._graphs and graphed):
            state.launched(rows, device_pass())
            return
        self._graphed.add(decodings[0])
        state.launched(rows, self._graphs.run((count, commits, masked, decodings[0]), device_pass))


def _round_up(count: int, step: int, most: int) -> int:
    """The next multiple of `step`, or `most` if that is less."""
    return min(grid_ceil(count, step), most)


def _power_of_two(count: int) -> int:
    """The least one that is not below `count`."""
    return 1 << (count - 1).bit_length()
