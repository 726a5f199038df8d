"""Names of earlier releases and what they are called now; the one place where a renamed thing is listed.

A config that uses an old name is refused with the new one said. What an earlier release wrote itself (the resolved
config of a run, its metrics) is read with the new names.
"""

from __future__ import annotations

from typing import Any

FIELDS = {
    "objective.trust_weight": "objective.importance_weight",
    "objective.source.stored_state": "objective.source.offline_state",
    "claims.figure": "claims.metric",  # of an ablation
}
VALUES = {"objective.source.kind": {"stored": "offline"}}
# in a run's metrics.jsonl and trajectories.jsonl
RUN_FILES = {"stored_share": "offline_share", "stored": "offline"}


def old_names(raw: Any, path: str = "") -> list[str]:
    """One message for every old name in a config as read from YAML, before it is validated."""
    if isinstance(raw, list):
        return [message for item in raw for message in old_names(item, path)]
    if not isinstance(raw, dict):
        new_value = VALUES.get(path, {}).get(raw) if isinstance(raw, str) else None
        return [f"{path} {raw!r} is now {new_value!r}; write that"] if new_value else []
    messages = []
    for name, value in raw.items():
        below = f"{path}.{name}" if path else str(name)
        if below in FIELDS:
            messages.append(f"{below} is now {FIELDS[below]}; write that")
        messages += old_names(value, below)
    return messages


def with_new_names(raw: Any, path: str = "") -> Any:
    """A resolved config of an earlier release under the names of this one."""
    if not isinstance(raw, dict):
        return VALUES.get(path, {}).get(raw, raw) if isinstance(raw, str) else raw
    named = {}
    for name, value in raw.items():
        below = f"{path}.{name}" if path else str(name)
        now = FIELDS.get(below, below).rsplit(".", 1)[-1]
        named[now] = with_new_names(value, below)
    return named
