"""Which rollout actor gets which prompts of a rollout batch, and when.

Prompts are dealt out as actors become free, those with the longest expected response first (the LPT rule: R. L.
Graham, Bounds on multiprocessing timing anomalies, 1969), so that no long response starts when the others are done. A
trajectory does not depend on the actor that makes it, so nothing here changes what is trained on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from common.prompts import Prompt


class ResponseLengths:
    """What the run knows about the lengths of responses, in tokens."""

    def __init__(self) -> None:
        self._of_prompt: dict[int, int] = {}  # of the last response to it
        self._of_domain: dict[str, tuple[int, int]] = {}  # responses and their tokens

    def note(self, prompt: Prompt, length: int) -> None:
        self._of_prompt[_key(prompt)] = length
        count, tokens = self._of_domain.get(prompt.domain, (0, 0))
        self._of_domain[prompt.domain] = count + 1, tokens + length

    def expected(self, prompt: Prompt, limit: int) -> float:
        """The length of the last response to the prompt, else the mean of its domain, else the limit; no more than the
        limit."""
        known: float | None = self._of_prompt.get(_key(prompt))
        if known is None and prompt.domain in self._of_domain:
            count, tokens = self._of_domain[prompt.domain]
            known = tokens / count
        return limit if known is None else min(known, limit)


def _key(prompt: Prompt) -> int:
    """The same for a prompt in every epoch."""
    return hash(prompt.ids.tobytes())


class Deck:
    """The prompts of a rollout batch that no actor has yet; prompts with offline responses are dealt at once.

    An actor is kept at `room` sequences that it has not sent on: as many as it has slots, and some that wait for one.

        deck = Deck(prompts, samples, actors=2, room=80, expected=expected)
        shares = deck.first()                 # a list of prompts for each actor
        share = deck.after(0, sent=8)         # actor 0 has sent 8 trajectories on; more prompts for it, or none
    """

    def __init__(
        self, prompts: list[Prompt], samples: int, actors: int, room: int, expected: Callable[[Prompt], float]
    ) -> None:
        """`samples`: trajectories of each prompt; `expected`: their length, in tokens."""
        self.room = room
        self.samples = samples
        self._expected = expected
        self._offline = [prompt for prompt in prompts if prompt.responses]
        sampled = [prompt for prompt in prompts if not prompt.responses]
        self._left = deque(sorted(sampled, key=expected, reverse=True))  # stable: equal ones in the run's order
        self._under_way = [0] * actors

    @property
    def empty(self) -> bool:
        return not self._left

    def first(self) -> list[list[Prompt]]:
        """The actors' first shares: as many sequences for each as for the others, and about as many tokens."""
        actors = range(len(self._under_way))
        shares = [self._offline[i :: len(actors)] for i in actors]
        offline = [sum(len(prompt.responses) for prompt in share) for share in shares]
        tokens = [0.0 for _ in actors]
        while self._left and min(self._under_way) < self.room:
            i = min(actors, key=lambda i: (self._under_way[i], tokens[i]))
            tokens[i] += self._expected(self._left[0]) * self.samples
            shares[i].append(self._deal(i))
        self._under_way = [count + more for count, more in zip(self._under_way, offline, strict=True)]
        return shares

    def after(self, actor: int, sent: int) -> list[Prompt]:
        """The prompts that an actor gets when it has sent so many more trajectories on."""
        self._under_way[actor] -= sent
        share = []
        while self._left and self._under_way[actor] < self.room:
            share.append(self._deal(actor))
        return share

    def rest(self) -> list[Prompt]:
        """All that is left; the deck is empty then."""
        rest = list(self._left)
        self._left.clear()
        return rest

    def _deal(self, actor: int) -> Prompt:
        self._under_way[actor] += self.samples
        return self._left.popleft()
