"""A job: one sequence that a client waits for, and what the engine has written of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from actors.sampler.request import Request
from actors.sampler.slots import WrittenBlock
from common.trajectory import Trajectory
from deploy.serving.errors import ApiError


@dataclass(eq=False)
class Job:
    """One sequence. The engine's thread writes, the event loop reads; `changed` is set in the event loop.

    `blocks` has what is written by the block's first position: finished blocks only, or with `rounds` the newest state
    of every block. A reader that is slow finds the newest state, so nothing piles up.
    """

    request: Request
    block_size: int
    changed: asyncio.Event
    streams: bool = False
    rounds: bool = False
    blocks: dict[int, WrittenBlock] = field(default_factory=dict)
    trajectory: Trajectory | None = None
    error: ApiError | None = None
    came: float = field(default_factory=time.monotonic)
    first_block: float | None = None  # seconds after it came

    @property
    def ordinal(self) -> int:
        return self.request.ordinal

    @property
    def ended(self) -> bool:
        return self.trajectory is not None or self.error is not None
