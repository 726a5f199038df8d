"""Invariant 2: the batched, cached, fused sampler equals the slow one-sequence reference."""

import textwrap
import time
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from actors.sampler.pass_plan import pass_rows
from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding, sample_tokens
from actors.sampler.slots import PATIENCE, SlotState
from common.config.rollout import RolloutConfig
from common.config.unmasking import (
    AdaptiveUnmasking,
    DynamicUnmasking,
    EntropyBoundUnmasking,
    SequentialUnmasking,
    StaticUnmasking,
)
from common.conversion import convert_folder
from common.seeds import stream_key
from common.student import load_model
from tests.models import tiny_qwen3
from tests.reference import reference_rollout

MASK, EOS, SEED = 287, 7, 5
LENGTHS = [1, 3, 4, 5, 8, 9, 11, 17]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(tiny_qwen3(tmp_path_factory.mktemp("model"), seed=2), torch.float32, "sdpa")


def requests(limit: int = 20) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(i, 0, rng.integers(0, 256, size=n), limit) for i, n in enumerate(LENGTHS)]


def sampler(model, block_size=4, slots=3) -> Sampler:
    return Sampler(model, block_size=block_size, mask_token_id=MASK, eos_token_id=EOS, slots=slots, seed=SEED)


RULES = [
    (StaticUnmasking(), {"rule": "static"}),
    (StaticUnmasking(steps_per_block=2), {"rule": "static", "per_step": 2}),
    (DynamicUnmasking(threshold=0.2), {"rule": "dynamic", "threshold": 0.2}),
    (DynamicUnmasking(threshold=0.5, revise=0.02), {"rule": "dynamic", "threshold": 0.5, "revise": 0.02}),
    (SequentialUnmasking(tokens_per_step=2), {"rule": "sequential", "per_step": 2}),
    (EntropyBoundUnmasking(bound_nats=4.0), {"rule": "entropy_bound", "bound": 4.0}),
    (AdaptiveUnmasking(lower=0.02, upper=0.2), {"rule": "adaptive", "lower": 0.02, "threshold": 0.2}),
]


@pytest.mark.parametrize(("unmasking", "reference"), RULES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_rounds_and_forwards_equal_the_reference(model, unmasking, reference, temperature):
    done = {t.ordinal: t for t in sampler(model).generate(requests(), Decoding(unmasking, temperature))}
    assert sorted(done) == list(range(len(LENGTHS)))
    for request in requests():
        ids, rounds, forwards = reference_rollout(
            model,
            request.prompt_ids.tolist(),
            max_new_tokens=20,
            block_size=4,
            mask_token_id=MASK,
            eos_token_id=EOS,
            temperature=temperature,
            key=(SEED, request.ordinal, 0),
            **reference,
        )
        t = done[request.ordinal]
        assert [*t.response_ids, *t.tail_ids] == ids
        assert t.reveal_round.tolist() == rounds
        assert t.denoise_forwards == forwards


@pytest.mark.parametrize("block_size", [1, 2, 8])
def test_other_block_sizes(model, block_size):
    for t in sampler(model, block_size).generate(requests(), Decoding(DynamicUnmasking(threshold=0.2), 0.0)):
        prompt = requests()[t.ordinal].prompt_ids.tolist()
        ids, rounds, _ = reference_rollout(
            model, prompt, max_new_tokens=20, block_size=block_size, mask_token_id=MASK, eos_token_id=EOS,
            rule="dynamic", threshold=0.2,
        )  # fmt: skip
        assert [*t.response_ids, *t.tail_ids] == ids
        assert t.reveal_round.tolist() == rounds


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_trajectories_do_not_depend_on_slots_or_order(model, slots):
    decoding = Decoding(DynamicUnmasking(threshold=0.2), 1.0)
    base = {t.ordinal: t for t in sampler(model, slots=3).generate(requests(), decoding)}
    other = {t.ordinal: t for t in sampler(model, slots=slots).generate(requests()[::-1], decoding)}
    for ordinal, t in base.items():
        assert t.response_ids.tolist() == other[ordinal].response_ids.tolist()
        assert t.reveal_round.tolist() == other[ordinal].reveal_round.tolist()
        np.testing.assert_allclose(t.confidence, other[ordinal].confidence, atol=1e-5)


def limited(of, method: str, tokens, most: int) -> None:
    """Memory runs out where `tokens` of a call's arguments are more than `most`."""
    whole = getattr(of, method)

    def call(*arguments):
        if tokens(*arguments) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(*arguments)

    setattr(of, method, call)


def test_passes_that_memory_does_not_hold_are_made_again_with_fewer_slots(model):
    decoding = Decoding(DynamicUnmasking(threshold=0.2), 1.0)
    base = {t.ordinal: t for t in sampler(model, slots=8).generate(requests(), decoding)}
    of = sampler(model, slots=8)
    limited(of.cached_model, "decode", lambda ids, *_: ids.numel(), most=20)
    made = list(of.generate(requests(), decoding))
    assert sorted(t.ordinal for t in made) == sorted(base), "each once"
    for t in made:
        assert t.response_ids.tolist() == base[t.ordinal].response_ids.tolist()
        assert t.reveal_round.tolist() == base[t.ordinal].reveal_round.tolist()
        assert t.denoise_forwards == base[t.ordinal].denoise_forwards
    assert of.slots == 2
    notes = of.take_notes()
    assert [note.split(": ")[1].split(" from")[0] for note in notes] == [
        "slots is 4 instead of 8",
        "slots is 2 instead of 4",
    ]
    assert notes[-1].endswith("set slots to 2") and of.take_notes() == []
    assert len(list(of.generate(requests(), decoding))) == 8 and of.take_notes() == [], "what fits is known"


def test_prompts_that_memory_does_not_hold_together_are_cached_in_smaller_forwards(model):
    decoding = Decoding(StaticUnmasking(), 1.0)
    base = {t.ordinal: t.response_ids.tolist() for t in sampler(model, slots=8).generate(requests(), decoding)}

    def tokens(state, slots, starts, ends):
        return len(slots) * max(ends)

    of = sampler(model, slots=8)
    limited(of, "_cache_together", tokens, most=16)
    assert {t.ordinal: t.response_ids.tolist() for t in of.generate(requests(), decoding)} == base
    assert (of.slots, of.prefill_budget.value) == (8, 12)
    assert all("max_batched_tokens is" in note for note in of.take_notes())


def test_memory_for_no_sequence_is_an_error_that_says_what_to_do(model):
    of = sampler(model, slots=8)
    limited(of.cached_model, "decode", lambda ids, *_: ids.numel(), most=3)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"does not hold one sequence of 40 tokens: lower curriculum\.max_"
    ):
        list(of.generate(requests(), Decoding(StaticUnmasking(), 1.0)))


@pytest.mark.parametrize("most", [1, 40])
def test_prompts_cached_in_several_forwards_change_nothing(model, most):
    decoding = Decoding(StaticUnmasking(), 1.0)
    twins = [*requests(12), *(replace(r, sample=1) for r in requests(12))]

    def responses(of):
        return {(t.ordinal, t.sample): t.response_ids.tolist() for t in of.generate(twins, decoding)}

    base = responses(sampler(model, slots=24))
    several = sampler(model, slots=24)
    several.prefill_budget.value = most
    assert responses(several) == base


@pytest.mark.parametrize("unmasking", [rule for rule, _ in RULES])
def test_padded_shapes_as_graphs_need_them_change_nothing(model, unmasking, monkeypatch):
    """What CUDA does, on CPU: passes of all slots, of half of them and so on, prefills of powers of two."""
    monkeypatch.setattr("actors.sampler.pass_plan.FEWEST_ROWS", 2)
    monkeypatch.setattr("actors.sampler.sampler.MOST_GRAPHED_TOKENS", 60)
    decoding = Decoding(unmasking, 1.0)
    twins = [*requests(20), *(replace(r, sample=1) for r in requests(5))]

    def made(of):
        return {
            (t.ordinal, t.sample): (t.response_ids.tolist(), t.tail_ids.tolist(), t.reveal_round.tolist())
            for t in of.generate(twins, decoding)
        }

    plain = made(sampler(model, slots=16))
    padded = sampler(model, slots=16)
    padded.few_shapes, padded.ahead = True, 1
    sizes, launched = set(), SlotState.launched

    def seen(state, rows, flags):
        sizes.add(len(rows))
        launched(state, rows, flags)

    monkeypatch.setattr(SlotState, "launched", seen)
    for _ in range(2):
        assert made(padded) == plain
    assert {16, 8, 4} <= sizes <= {16, 8, 4, 2}


def test_memory_of_the_longest_sequence_is_made_once(model):
    """A response limit that grows from batch to batch discards no graph."""
    decoding, memories = Decoding(StaticUnmasking(), 1.0), []
    for few_shapes in (True, False):
        of = sampler(model, slots=4)
        of.longest, of.few_shapes = 300, few_shapes
        for limit in (4, 160):
            list(of.generate(requests(limit)[:2], decoding))
            memories.append(of._state)
    assert memories[0] is memories[1] and memories[2] is not memories[3]


def test_the_slots_of_a_pass():
    running = np.zeros(20, bool)
    running[[3, 7, 19]] = True
    assert pass_rows(running).tolist() == [3, 7, 19, *(i for i in range(12) if i not in (3, 7))][:10]
    running[:9] = True
    assert pass_rows(running).tolist() == [*range(9), 19]
    running[9] = True
    assert sorted(pass_rows(running)) == list(range(20))
    assert pass_rows(np.ones(3, bool)).tolist() == [0, 1, 2]


def test_requests_that_come_while_others_run_change_nothing(model):
    decoding = Decoding(StaticUnmasking(), 1.0)
    base = {t.ordinal: t.response_ids.tolist() for t in sampler(model).generate(requests(), decoding)}
    late, waited = [[r] for r in requests()[2:]], []

    def more(wait: bool) -> list[Request] | None:
        waited.append(wait)
        if wait or len(waited) % 3 == 0:
            return late.pop(0) if late else None
        return []

    of = sampler(model)
    start = time.perf_counter()
    made = {t.ordinal: t.response_ids.tolist() for t in of.generate(requests()[:2], decoding, more, longest=64)}
    assert made == base
    assert 0.1 < of.slot_seconds / (of.slots * (time.perf_counter() - start)) < 1
    late += [[r] for r in requests()]
    waited.clear()
    assert {t.ordinal for t in of.generate([], decoding, more, longest=64)} == set(base)
    assert waited[0] and not all(waited)


def test_a_sampler_follows_a_changing_threshold(model):
    def rounds(of, threshold):
        done = {t.ordinal: t for t in of.generate(requests(), Decoding(DynamicUnmasking(threshold=threshold), 1.0))}
        return [done[ordinal].reveal_round.tolist() for ordinal in sorted(done)]

    ramped = sampler(model)
    fresh = [rounds(sampler(model), threshold) for threshold in (0.05, 0.6, 0.05)]
    assert [rounds(ramped, threshold) for threshold in (0.05, 0.6, 0.05)] == fresh
    assert fresh[0] != fresh[1]


@pytest.mark.parametrize("unmasking", [rule for rule, _ in RULES])
@pytest.mark.parametrize("room", [1, 0.5])
def test_passes_launched_ahead_and_slots_that_wait_change_nothing(model, unmasking, room, monkeypatch):
    decoding = Decoding(unmasking, 1.0)
    base = {t.ordinal: t for t in sampler(model).generate(requests(), decoding)}
    expected, rooms = SlotState.expected, cycle([room, room, 1])
    monkeypatch.setattr(
        SlotState,
        "expected",
        lambda *args: [int(np.ceil(count * factor)) for factor in [next(rooms)] for count in expected(*args)],
    )
    ahead = sampler(model)
    ahead.ahead = 1
    for _ in range(2):  # again with what the first call left behind
        other = {t.ordinal: t for t in ahead.generate(requests(), decoding)}
        for ordinal, t in base.items():
            assert t.response_ids.tolist() == other[ordinal].response_ids.tolist()
            assert t.tail_ids.tolist() == other[ordinal].tail_ids.tolist()
            assert t.reveal_round.tolist() == other[ordinal].reveal_round.tolist()
            assert t.denoise_forwards == other[ordinal].denoise_forwards
            assert t.commit_forwards == other[ordinal].commit_forwards
            np.testing.assert_allclose(t.confidence, other[ordinal].confidence, atol=1e-5)


def test_the_life_of_a_slot():
    """The example in SlotState's docstring, step by step."""
    state = SlotState(slots=1, length=12, block_size=4, device=torch.device("cpu"))
    request = Request(0, 0, np.arange(20, 25), 6)
    state.admit({0: request}, [0], [0.9], MASK, lambda _: 12)

    def now() -> tuple[int, list[int], bool]:
        block = int(state.block)
        masked = [4 * block + offset for offset in state.masked[0].nonzero()[:, 0].tolist()]
        assert (block, len(masked), bool(state.uncommitted)) == (
            state.block_host[0], state.masked_host[0], state.uncommitted_host[0],
        )  # fmt: skip
        return block, masked, bool(state.uncommitted)

    def run(*positions: int) -> list[int]:
        """A pass that reveals these, each as the token 100 more than its position."""
        reveal = torch.tensor([[4 * int(state.block) + j in positions for j in range(4)]])
        tokens = 100 + 4 * state.block[:, None] + torch.arange(4)
        slots, waits = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)
        assert state.expected(1, True) == (int(state.uncommitted), int(state.masked.sum()))
        state.launched(np.zeros(1, np.int64), state.reveal(slots, reveal, tokens, reveal.float(), waits, EOS))
        return state.read()

    assert now() == (1, [5, 6, 7], False)
    assert run(6, 7) == []
    assert now() == (1, [5], False)
    assert run(5) == []
    assert now() == (2, [8, 9, 10, 11], True)
    assert run(8) == []
    assert now() == (2, [9, 10, 11], False)
    assert run(9, 10, 11) == [0]
    assert now() == (2, [], False)
    (t,) = state.take([0], EOS, 3)
    assert t.response_ids.tolist() == [105, 106, 107, 108, 109, 110]
    assert t.tail_ids.tolist() == [111]
    assert t.reveal_round.tolist() == [1, 0, 0, 0, 1, 1, 1]
    assert (t.finish_reason, t.denoise_forwards, t.commit_forwards, t.weights_version) == ("length", 4, 1, 3)
    assert not state.active and not state.running.any()


def test_the_example_of_the_sampler_runs(tmp_path, capsys):
    convert_folder(tiny_qwen3(tmp_path / "arlm"), tmp_path / "student", 4, "<|mask|>", torch.float32)
    example = Sampler.__doc__.split("Example, which prints responses as they end::")[1].split("On CUDA")[0]
    code = textwrap.dedent(example.rstrip()).replace("runs/tiny/checkpoints/final", str(tmp_path / "student"))
    exec(code, {"Sampler": Sampler, "Request": Request, "Decoding": Decoding})
    assert {line.split("?")[0] for line in capsys.readouterr().out.splitlines() if "How many" in line} == {
        "Tom has 5 apples and buys 4 more. How many now",
        "Ann has 9 pens and loses 2. How many now",
    }


def test_a_slot_that_waits_too_often_gets_room():
    state = SlotState(slots=2, length=8, block_size=4, device=torch.device("cpu"))
    state.running[:] = True
    state.masked_host[:] = 4, 1
    state.waits[:] = 0, PATIENCE - 1
    assert state.expected(1, True) == (0, 5)
    state.waits[1] += 1
    assert state.expected(1, True) == (2, 8)


def test_ends_at_the_end_token_and_on_the_grid(model):
    finished = list(sampler(model).generate(requests(64), Decoding(DynamicUnmasking(threshold=0.2), 1.0)))
    for t in finished:
        assert len(t.x0) % 4 == 0
        assert MASK not in t.x0[len(t.prompt_ids) :]
        assert EOS not in t.response_ids[:-1]
        assert (t.finish_reason == "eos") == (t.response_ids[-1] == EOS)
        assert len(t.response_ids) == 64 or (t.finish_reason == "eos" and len(t.response_ids) < 64)
    assert {t.finish_reason for t in finished} == {"eos", "length"}


@pytest.mark.parametrize("block_size", [1, 4, 8, 16])
@pytest.mark.parametrize("limit", [1, 6, 20])
def test_a_response_is_cut_at_the_limit_wherever_its_block_ends(model, block_size, limit):
    decoding = Decoding(DynamicUnmasking(threshold=0.2), 1.0)
    cut = list(sampler(model, block_size).generate(requests(limit), decoding))
    longer = {t.ordinal: t for t in sampler(model, block_size).generate(requests(limit + 2 * block_size), decoding)}
    for t in cut:
        assert len(t.x0) % block_size == 0
        assert len(t.reveal_round) == len(t.confidence) == len(t.response_ids) + len(t.tail_ids)
        assert t.response_ids.tolist() == longer[t.ordinal].response_ids[:limit].tolist()
        assert t.finish_reason == ("eos" if t.response_ids[-1] == EOS else "length")
        assert len(t.response_ids) == limit or t.finish_reason == "eos"
    assert any(len(t.response_ids) == limit for t in cut)


def test_an_end_token_behind_the_limit_does_not_count(model):
    """It stands in the tail; the sequence did not end by itself."""
    decoding = Decoding(DynamicUnmasking(threshold=0.2), 1.0)
    ended = [t for t in sampler(model, 8).generate(requests(64), decoding) if t.finish_reason == "eos"]
    ended = [t for t in ended if (len(t.causal_ids) - 1) % 8]  # the end token is not the first of its block
    assert ended
    for t in ended:
        limit = len(t.response_ids) - 1
        (again,) = sampler(model, 8).generate([requests(limit)[t.ordinal]], decoding)
        assert (again.finish_reason, len(again.response_ids), again.tail_ids[0]) == ("length", limit, EOS)


def test_broken_weights_are_refused_by_name(model):
    broken = sampler(model)
    weight = model.model.norm.weight.data.clone()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="ordinals"):
        list(broken.generate(requests(), Decoding()))
    model.model.norm.weight.data.copy_(weight)


def test_sampling_follows_the_tempered_truncated_distribution():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, 3.0])
    count, mask = 200_000, 4
    noise = (torch.arange(count) + 0.5) / count
    for decoding, expected in [
        (Decoding(temperature=2.0), torch.softmax(logits[:4] / 2, 0)),
        (Decoding(top_k=2), torch.softmax(logits[:2], 0)),
        (Decoding(top_p=0.5), torch.ones(1)),
    ]:
        tokens, confidence, _ = sample_tokens(logits.expand(count, 5), noise, decoding, mask)
        share = torch.bincount(tokens, minlength=5).float() / count
        torch.testing.assert_close(share[: len(expected)], expected, atol=1e-4, rtol=0)
        raw = torch.softmax(logits, 0)
        torch.testing.assert_close(confidence, raw[tokens])


def test_entropy_is_of_the_raw_softmax():
    logits = torch.randn(3, 4, 9)
    _, _, entropy = sample_tokens(logits, torch.full((3, 4), 0.5), Decoding(EntropyBoundUnmasking()), 8)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy, expected)


@pytest.mark.parametrize("unmasking", [StaticUnmasking(), DynamicUnmasking(threshold=0.2)])
def test_a_warm_up_leaves_no_trace_in_counters_and_trajectories(model, unmasking):
    warm, cold = sampler(model), sampler(model)
    decoding = Decoding(unmasking, 1.0)
    warm.warm_up(decoding)
    assert (warm.forwards, warm.token_rows, warm.slot_seconds) == (0, 0, 0.0)
    assert warm._state is not None, "it has run"
    made = [{t.ordinal: t for t in s.generate(requests(), decoding)} for s in (warm, cold)]
    for ordinal, t in made[1].items():
        assert made[0][ordinal].response_ids.tolist() == t.response_ids.tolist()
        assert made[0][ordinal].denoise_forwards == t.denoise_forwards
    assert warm.forwards == cold.forwards and warm.token_rows == cold.token_rows


def test_requests_with_settings_of_their_own_share_passes(model):
    """Each is what it would be in a call with those settings; passes are shared, and requests come in between."""
    settings = [Decoding(rule, temperature) for (rule, _), temperature in zip(RULES, [0.0, 1.0, 1.0, 0.7, 1.0, 1.0])]
    settings += [Decoding(DynamicUnmasking(threshold=0.6), 1.0), Decoding(StaticUnmasking(), 1.0, top_k=3, top_p=0.5)]
    asked = [replace(requests()[i % len(LENGTHS)], ordinal=i, decoding=d) for i, d in enumerate(settings)]
    alone = {}
    for request in asked:
        (alone[request.ordinal],) = sampler(model).generate([replace(request, decoding=None)], request.decoding)
    waiting = asked[3:]
    of = sampler(model, slots=4)
    made = {t.ordinal: t for t in of.generate(asked[:3], Decoding(), lambda _: [waiting.pop()] if waiting else None)}
    for ordinal, t in alone.items():
        assert made[ordinal].response_ids.tolist() == t.response_ids.tolist()
        assert made[ordinal].reveal_round.tolist() == t.reveal_round.tolist()
    assert of.forwards < sum(t.denoise_forwards for t in alone.values()) / 2


def test_revealed_tokens_may_be_revised_and_prompts_never(model):
    """Some are, so that the texts differ; what is above the bar at once stays as it is."""
    plain = {t.ordinal: t for t in sampler(model).generate(requests(), Decoding(DynamicUnmasking(), 0.0))}
    rule = DynamicUnmasking(revise=0.01)
    changed = {t.ordinal: t for t in sampler(model).generate(requests(), Decoding(rule, 0.0))}
    assert any(plain[i].response_ids.tolist() != changed[i].response_ids.tolist() for i in plain)
    for i, request in enumerate(requests()):
        assert changed[i].prompt_ids.tolist() == request.prompt_ids.tolist()
    never = DynamicUnmasking(revise=0.999)
    same = {t.ordinal: t for t in sampler(model).generate(requests(), Decoding(never, 0.0))}
    assert all(plain[i].response_ids.tolist() == same[i].response_ids.tolist() for i in plain)


def test_rollouts_do_not_revise():
    with pytest.raises(ValidationError, match=r"unmasking\.revise \(0\.5\) is for generation and evaluation"):
        RolloutConfig(unmasking={"rule": "dynamic", "revise": 0.5})


def test_a_key_names_the_random_stream(model):
    decoding = Decoding(StaticUnmasking(), 1.0)
    (seeded,) = sampler(model).generate([requests()[2]], decoding)
    other = replace(requests()[2], ordinal=77, key=stream_key(SEED, 2, 0))
    (keyed,) = sampler(model).generate([other], decoding)
    assert keyed.response_ids.tolist() == seeded.response_ids.tolist()
    assert keyed.ordinal == 77


def test_what_is_written_is_seen_between_passes_and_sequences_can_be_cancelled(model):
    decoding = Decoding(DynamicUnmasking(threshold=0.2), 1.0)
    whole = {t.ordinal: t for t in sampler(model, slots=8).generate(requests(), decoding)}
    of = sampler(model, slots=8)
    ended, finished, looks = [], {}, 0
    for number, trajectories in enumerate(of.passes(requests(), decoding)):
        ended += trajectories
        if number == 1:
            of.cancel({1})
        for block in of.current_blocks(range(10)):
            t, now = whole[block.ordinal], slice(block.start, block.start + 4)
            known = ~block.masked
            assert block.ids[known].tolist() == t.x0[now][known].tolist()
            assert (block.ids[block.masked] == MASK).all()
            looks += bool(block.masked.any() and known.any())
        for block in of.finished_blocks({0, 2}):
            assert not block.masked.any()
            finished.setdefault(block.ordinal, []).extend(zip(range(block.start, block.start + 4), block.ids))
    assert looks
    assert {t.ordinal for t in ended} == whole.keys() - {1}
    for t in ended:
        assert t.response_ids.tolist() == whole[t.ordinal].response_ids.tolist()
    assert finished.keys() <= {0, 2} and finished
    for ordinal, tokens in finished.items():
        assert [token for _, token in tokens] == [whole[ordinal].x0[at] for at, _ in tokens]
