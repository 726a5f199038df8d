"""Command line options that several commands share: the student and how it decodes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import typer

from common.config.run import (
    DynamicUnmasking,
    EntropyBoundUnmasking,
    SequentialUnmasking,
    StaticUnmasking,
    Unmasking,
)

DEFAULT_THRESHOLD = DynamicUnmasking().threshold


class RuleName(StrEnum):
    """An enumeration, since a repeatable option takes no Literal."""

    static = "static"
    dynamic = "dynamic"
    sequential = "sequential"
    entropy_bound = "entropy_bound"


Rule = Annotated[
    RuleName,
    typer.Option(
        metavar="RULE",
        help="which masked tokens a step reveals: static (one, the most confident), sequential (one, the leftmost), "
        "dynamic (all above the threshold) or entropy_bound (the surest within an entropy budget)",
    ),
]
Threshold = Annotated[float, typer.Option(min=0, max=1, help="confidence threshold of the dynamic rule")]
BlockSize = Annotated[int | None, typer.Option(min=1, help="tokens per block; default: the model's own")]
DtypeName = Annotated[Literal["float32", "bfloat16"], typer.Option(help="of weights and activations")]
Student = Annotated[str, typer.Argument(help="folder of a trained or converted student", metavar="MODEL")]


def unmasking_of(rule: str, threshold: float) -> Unmasking:
    """The unmasking rule of the --rule and --threshold options."""
    rules: dict[str, Unmasking] = {
        "static": StaticUnmasking(),
        "dynamic": DynamicUnmasking(threshold=threshold),
        "sequential": SequentialUnmasking(),
        "entropy_bound": EntropyBoundUnmasking(),
    }
    return rules[rule]
