"""Command line options that several commands share: the student and how it decodes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import typer

from common.config.errors import ConfigError
from common.config.unmasking import (
    AdaptiveUnmasking,
    DynamicUnmasking,
    EntropyBoundUnmasking,
    SequentialUnmasking,
    SpeculativeUnmasking,
    StaticUnmasking,
    Unmasking,
)
from common.grid import grid_floor
from deploy.argument_checks import a_path, finite, temperature

DEFAULT_THRESHOLD = DynamicUnmasking().threshold
DEFAULT_LOWER = AdaptiveUnmasking().lower


class RuleName(StrEnum):
    """An enumeration, since a repeatable option takes no Literal."""

    static = "static"
    dynamic = "dynamic"
    sequential = "sequential"
    entropy_bound = "entropy_bound"
    adaptive = "adaptive"
    speculative = "speculative"


Rule = Annotated[
    RuleName,
    typer.Option(
        "--rule",  # typer 0.27 would spell it --RULE, after the metavar
        metavar="RULE",
        help="which masked tokens a step reveals: static (one, the most confident), sequential (one, the leftmost), "
        "dynamic (all above the threshold), entropy_bound (the most certain, up to a total entropy), adaptive (all "
        "above a threshold that follows the confidences seen) or speculative (a block, of which the causal reading "
        "keeps what it would have written)",
    ),
]
Threshold = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="confidence threshold of the dynamic rule, upper bound of that of the adaptive one",
        callback=finite,
    ),
]
Lower = Annotated[
    float, typer.Option(min=0, max=1, help="lower bound of the adaptive rule's threshold", callback=finite)
]
REVISE_HELP = (
    "probability above which another token replaces one that the present block has revealed, under the dynamic rule; "
    "0: never"
)
Revise = Annotated[float, typer.Option(min=0, max=0.999, help=REVISE_HELP, callback=finite)]
DraftRounds = Annotated[
    int,
    typer.Option(
        min=1,
        help="steps of a draft under the speculative rule; all but the last reveal what is above the threshold",
    ),
]
Verify = Annotated[
    str,
    typer.Option(
        help="who verifies under the speculative rule: self (the student, read causally), base (the model of an "
        "adapter), or the folder of the original",
        callback=a_path,
    ),
]
Temperature = Annotated[
    float, typer.Option(min=0, max=100, help="temperature of sampling; 0: greedy", callback=temperature)
]
BlockSize = Annotated[int | None, typer.Option(min=1, help="tokens per block; default: the model's own")]
DtypeName = Annotated[Literal["float32", "bfloat16"], typer.Option(help="data type of weights and activations")]
Student = Annotated[
    str, typer.Argument(help="folder of a trained or converted student", metavar="MODEL", callback=a_path)
]
Adapter = Annotated[
    str | None,
    typer.Option(help="folder of an adapter, of which MODEL is the base then, wherever it lies now", callback=a_path),
]


def unmasking_of(
    rule: str,
    threshold: float,
    lower: float = DEFAULT_LOWER,
    draft_rounds: int = 1,
    revise: float = 0.0,
    verify: Literal["self", "base"] = "self",
) -> Unmasking:
    """The unmasking rule of the --rule, --threshold, --lower, --draft-rounds and --revise options, and who verifies.

    Raises:
        ConfigError: the rule is adaptive and its bounds are the wrong way round; or it does not revise.
    """
    if revise and rule != "dynamic":
        raise ConfigError(f"--revise: {revise:g} is for the dynamic rule, and --rule is {rule}; leave it out")
    if rule == "adaptive":
        return adaptive(lower, threshold)
    rules: dict[str, Unmasking] = {
        "static": StaticUnmasking(),
        "dynamic": DynamicUnmasking(threshold=threshold, revise=revise),
        "sequential": SequentialUnmasking(),
        "entropy_bound": EntropyBoundUnmasking(),
        "speculative": SpeculativeUnmasking(verify=verify, draft_rounds=draft_rounds, threshold=threshold),
    }
    return rules[rule]


def adaptive(lower: float, upper: float) -> AdaptiveUnmasking:
    """The adaptive rule between --lower and --threshold.

    Raises:
        ConfigError: --lower is above --threshold.
    """
    if lower > upper:
        raise ConfigError(f"--lower: {lower:g} is above --threshold {upper:g}; choose a value of at most {upper:g}")
    return AdaptiveUnmasking(lower=lower, upper=upper)


def response_limit(asked: int | None, default: int, *, longest: int, positions: int, block_size: int) -> int:
    """Tokens of the longest response: `asked`, or up to `default`, where they fit into the model's positions.

    Args:
        longest: tokens of the longest prompt.

    Raises:
        ConfigError: they do not fit behind that prompt.
    """
    room = grid_floor(positions, block_size) - longest
    if room < (asked or 1):
        remedy = f"use {room} or less" if room > 0 else "shorten the prompt"
        raise ConfigError(
            f"--max-new-tokens: {asked or 1} after the longest prompt ({longest} tokens) does not fit into the model's "
            f"{positions} positions at block size {block_size}; {remedy}"
        )
    return asked or min(room, default)
