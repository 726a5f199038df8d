"""Where the wall time of a rollout batch goes.

For each role: busy, waiting or blocked; the three shares add up to one.

| role | busy | waiting (for input) | blocked (by what comes after) |
| --- | --- | --- | --- |
| rollout | generates | its share is done, another actor's is not | the staleness bound holds back the next batch |
| teacher | computes targets | rollouts are under way, none has ended | no rollouts are under way |
| learner | trains | the batch is not complete | publishes, and waits until weights are loaded |

For the whole: `overhead`, the share in which no actor generates, computes targets, trains, publishes or loads weights.
What is left then is Ray, Arrow and the control loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Window:
    """The wall time of one turn of the control loop, in Unix time; the next turn begins where it ends."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def covered(self, spans: Iterable[tuple[float, float]]) -> float:
        """Seconds of the window inside the union of (begin, end) spans."""
        total, reached = 0.0, self.begin
        for begin, end in sorted(spans):
            begin, end = max(begin, reached), min(end, self.end)
            if end > begin:
                total += end - begin
                reached = end
        return total

    def overhead(self, spans: Iterable[tuple[float, float]]) -> float:
        """Share of the window outside all (begin, end) spans."""
        return 1.0 - self.covered(spans) / self.seconds if self.seconds > 0 else 0.0

    def shares(self, role: str, busy_seconds: Sequence[float], phase_seconds: float) -> dict[str, float]:
        """`busy/ROLE`, `waiting/ROLE` and `blocked/ROLE` of a role; nothing of a role without actors.

        Args:
            busy_seconds: of each of the role's actors.
            phase_seconds: time in which the role had work or was about to get it; what exceeds it is blocked.
        """
        if not busy_seconds:
            return {}
        seconds = max(self.seconds, 1e-9)
        # with staleness 1 an actor's counters may tell of work done before the window
        busy = min(fmean(busy_seconds) / seconds, 1.0)
        waiting = min(max(phase_seconds / seconds - busy, 0.0), 1.0 - busy)
        return {f"busy/{role}": busy, f"waiting/{role}": waiting, f"blocked/{role}": 1.0 - busy - waiting}
