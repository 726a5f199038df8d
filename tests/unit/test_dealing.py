"""Dealing prompts out: what every actor gets, that trajectories do not depend on it, how full it keeps the slots."""

import time
from collections import Counter
from queue import SimpleQueue

import numpy as np
import pytest

from actors.rollout import RolloutActor
from common.config.file import load_config
from common.config.unmasking import StaticUnmasking
from common.prompts import Prompt, longest_response
from common.trajectory import from_batch
from deploy.dealing import Deck, ResponseLengths
from tests.benchmarks.lengths import uneven_lengths
from tests.models import tiny_qwen3

BLOCK, LIMIT = 4, 96


def prompts_of(count: int, domains: list[str] | None = None) -> list[Prompt]:
    rng = np.random.default_rng(1)
    return [
        Prompt(i, "q", rng.integers(8, 250, 5 + i % 7).astype(np.int32), domain=domains[i] if domains else "")
        for i in range(count)
    ]


def test_what_is_expected_of_a_prompt():
    first, second, other = prompts_of(3, ["math", "math", "code"])
    lengths = ResponseLengths()
    assert lengths.expected(first, 100) == 100
    lengths.note(first, 20)
    lengths.note(first, 40)
    assert [lengths.expected(p, 100) for p in (first, second, other)] == [40, 30, 100]
    assert [lengths.expected(p, 25) for p in (first, second, other)] == [25, 25, 25]
    again = Prompt(17, "q", first.ids.copy(), domain="math")  # in the next epoch
    assert lengths.expected(again, 100) == 40


def test_a_deck_deals_the_longest_first_and_keeps_actors_at_their_room():
    prompts = prompts_of(11)
    expected = {p.ordinal: length for p, length in zip(prompts, [5, 9, 1, 8, 7, 2, 6, 3, 4, 0, 10], strict=True)}
    deck = Deck(prompts, 2, 2, 5, lambda p: expected[p.ordinal])

    def lengths(share):
        return [expected[p.ordinal] for p in share]

    # six sequences each, so that both have at least five; the longer one to the actor with less so far
    assert [lengths(share) for share in deck.first()] == [[10, 7, 6], [9, 8, 5]]
    assert (deck.after(0, 1), deck.empty) == ([], False)
    assert lengths(deck.after(0, 1)) == [4]
    assert lengths(deck.after(1, 6)) == [3, 2, 1]
    assert not deck.empty
    assert lengths(deck.after(0, 4)) == [0]
    assert deck.empty
    assert deck.after(1, 2) == []


def test_offline_responses_are_dealt_at_once_and_evenly():
    body = np.arange(3, dtype=np.int32)
    prompts = [*prompts_of(6), *(Prompt(6 + i, "q", body, responses=(body, body)) for i in range(5))]
    deck = Deck(prompts, 1, 2, 2, lambda p: 1.0)
    assert [[p.ordinal for p in share] for share in deck.first()] == [[6, 8, 10, 0, 2], [7, 9, 1, 3]]
    assert deck.after(0, 6) == []  # what is left are its two sampled ones
    assert [p.ordinal for p in deck.after(0, 1)] == [4]


@pytest.fixture(scope="module")
def actor_of(tmp_path_factory):
    """An actor of a random model that hardly ever ends a response, whose lengths are those of the prompts' domains."""
    path = tiny_qwen3(tmp_path_factory.mktemp("model"), seed=4)
    caps = {f"d{i}": length for i, length in enumerate(lengths_like_real_ones())}
    domains = "{" + ", ".join(f"{name}: {length}" for name, length in caps.items()) + "}"

    def build(index: int, slots: int) -> RolloutActor:
        return RolloutActor(
            load_config("tiny", [
                "--model.path", path, "--teacher.path", path, "--data.domain_max_tokens", domains,
                "--rollout.slots", str(slots), "--rollout.stream_rows", "2",
            ]),
            index,
        )  # fmt: skip

    return build


def lengths_like_real_ones() -> list[int]:
    """Of 128 responses, cut at the limit, which is 3.5 times their mean."""
    return [min(length, LIMIT) for length in uneven_lengths(30, 128)]


def rolled_out(actors, prompts, slots, expected, fixed=False):
    """All trajectories by key, and the mean share of slots in use, where every pass of an actor takes as long.

    The pipeline's part is played here: the actor that is behind goes on, and is dealt more for what it has sent. With
    `fixed` shares all is dealt at the start, in turn, as it was before.
    """
    deck = Deck(prompts, 1, len(actors), slots + 2 * 2, expected)
    shares = [prompts[i :: len(actors)] for i in range(len(actors))] if fixed else deck.first()
    more = () if fixed or deck.empty else (3, max(len(p.ids) for p in prompts) + LIMIT + BLOCK)
    streams = {
        i: actor.rollout(share, LIMIT, BLOCK, StaticUnmasking(), *more)
        for i, (actor, share) in enumerate(zip(actors, shares, strict=True))
    }
    before = [actor.sampler.forwards for actor in actors]

    def passes(i: int) -> int:
        return actors[i].sampler.forwards - before[i]

    found, open_deck = {}, bool(more)
    while streams:
        i = min(streams, key=passes)
        batch = next(streams[i], None)
        if batch is None:
            del streams[i]
            continue
        next(streams[i])  # the record batch's BatchInfo
        found.update({(t.ordinal, t.sample): t for t in from_batch(batch)[0]})
        if open_deck:
            if share := deck.after(i, 2):
                actors[i].deal(3, share)
            if deck.empty:
                open_deck = False
                for actor in actors:
                    actor.deal(3, None)
    used = sum(t.denoise_forwards for t in found.values())
    return found, used / (len(actors) * slots * max(map(passes, range(len(actors)))))


def test_trajectories_do_not_depend_on_the_dealing(actor_of):
    prompts = prompts_of(40, [f"d{i}" for i in range(40)])

    def made(actors, slots, expected, fixed=False):
        found, _ = rolled_out([actor_of(i, slots) for i in range(actors)], prompts, slots, expected, fixed)
        assert len(found) == 40
        return {
            key: (t.response_ids.tolist(), t.tail_ids.tolist(), t.reveal_round.tolist()) for key, t in found.items()
        }

    base = made(1, 40, lambda p: 0, fixed=True)
    rng = np.random.default_rng(0)
    for actors in (1, 2, 3):
        assert made(actors, 4, lambda p: rng.random()) == base


def test_slots_in_use(actor_of):
    """Two actors of 16 slots, 128 prompts: from the second epoch on, when every prompt's last length is known."""
    slots, domains = 16, [f"d{i}" for i in range(128)]
    prompts, actors, lengths = prompts_of(128, domains), [actor_of(i, slots) for i in range(2)], ResponseLengths()

    def limit(prompt: Prompt) -> int:
        return longest_response(prompt, LIMIT, {}, BLOCK)

    _, fixed = rolled_out(actors, prompts, slots, limit, fixed=True)
    found, unknown = rolled_out(actors, prompts, slots, limit)
    for t in found.values():
        lengths.note(prompts[t.ordinal], len(t.response_ids))
    again, known = rolled_out(actors, prompts, slots, lambda p: lengths.expected(p, limit(p)))
    print(f"slots in use: fixed shares {fixed:.0%}, dealt {unknown:.0%}, with known lengths {known:.0%}")
    assert Counter(t.finish_reason for t in again.values())["length"] > 100  # the lengths are those given
    assert known >= 0.7
    assert known > unknown and known > fixed


def test_an_actor_that_waits_for_prompts_is_not_busy(actor_of):
    class Slow(SimpleQueue):
        def get(self):
            time.sleep(1.0)
            return super().get()

    actor = actor_of(0, 4)
    actor._dealt[3] = Slow()
    actor.deal(3, None)
    assert list(actor.rollout([], LIMIT, BLOCK, StaticUnmasking(), 3, 64)) == []
    assert actor.busy_seconds < 0.9
