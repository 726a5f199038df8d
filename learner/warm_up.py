"""The warm-up: forward and backward are compiled before there is anything to train on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from learner.batches import BatchBuilder
from learner.objective import empty_sums

if TYPE_CHECKING:  # slow to import and chatty, as DeepSpeed is
    from learner.engines import Engine

_TOKENS = 2048


def warm_up(engine: Engine, builder: BatchBuilder) -> None:
    """Compile forward and backward, on a row that trains nothing, while the other roles load. It adds zeros to the
    gradients, as the rows do that a rank without work gets."""
    row = builder.untrained(min(_TOKENS, builder.max_tokens))
    loss = engine.forward(builder.tensors(row, []), empty_sums(builder.device), last=False)
    engine.backward(loss)
