"""What `opdlm serve` is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from common.config.errors import ConfigError
from deploy.evaluation.decoding_options import RuleName
from deploy.model_checks import StudentPath

LONGEST = 4096  # tokens of a sequence, where nothing else is asked for
MOST_REPLICAS = 1024


@dataclass(frozen=True)
class Replicas:
    """Servers behind one port: between `least` and `most`, as many as the requests need."""

    least: int
    most: int

    @classmethod
    def parsed(cls, text: str) -> Replicas:
        """Of N, or LEAST:MOST.

        Raises:
            ConfigError: it is neither, or has a number that is not served.
        """
        match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text, re.ASCII)
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most <= MOST_REPLICAS:
            raise ConfigError(
                f"--replicas: {text!r} is neither a number nor LEAST:MOST, from 1 to {MOST_REPLICAS}; use 4, or 1:4"
            )
        return cls(least, most)


@dataclass(frozen=True)
class ServingOptions:
    """The options of `opdlm serve`; `decoding` is the rule, its threshold and its lower bound, `student` where its
    folder and, of an adapter, the base model are, `verifier` the original that verifies under the speculative rule."""

    student: StudentPath
    verifier: str | None
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
