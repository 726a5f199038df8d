"""What `opdlm serve` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from deploy.evaluation.decoding_options import RuleName

LONGEST = 4096  # tokens of a sequence, where nothing else is asked for
MOST_REPLICAS = 1024


@dataclass(frozen=True)
class ServingOptions:
    """The options of `opdlm serve`; `decoding` is the rule, its threshold and its lower bound."""

    model: str
    name: str
    host: str
    api_key: str | None = field(repr=False)
    slots: int | None
    max_length: int | None
    max_tokens: int
    queue: int
    prefix_cache: int | None
    timeout: float
    compare: str | None
    decoding: tuple[RuleName, float, float]
    block_size: int | None
    temperature: float
    dtype: str
    thinking: bool | None
    system: str | None
