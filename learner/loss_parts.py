"""The losses of a sum: how their totals and metrics are named."""

from __future__ import annotations

from collections.abc import Mapping


def of_part(name: str, part: int) -> str:
    """The name of a total of loss `part`; those of the main loss, 0, have no number."""
    return f"{name}/{part}" if part else name


def part_metrics(totals: Mapping[str, float], parts: int, updates: int) -> dict[str, float]:
    """The metrics of the losses of a sum; none where there is one loss only."""
    if parts == 1:
        return {}
    losses = {f"part/{i}/loss": totals[of_part("loss", i)] / updates for i in range(parts)}
    divergences = {
        f"part/{i}/kl": totals[of_part("divergence", i)] / max(totals[of_part("positions", i)], 1.0)
        for i in range(1, parts)
    }
    return losses | divergences
