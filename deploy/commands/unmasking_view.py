"""How a text was unmasked: every round of every block, and the text with its tokens coloured by round."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from common.trajectory import Trajectory

_COLOURS = ("green", "cyan", "blue", "magenta", "red", "yellow")
KEPT, CORRECTED, OWN = "drafted and kept", "corrected", "the verifier's own"
_ORIGIN_COLOURS = {KEPT: "green", CORRECTED: "red", OWN: "cyan"}
_VISIBLE = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def colour_of(round_: int) -> str:
    """Colour of a round; the last one stands for all later rounds too."""
    return _COLOURS[min(round_, len(_COLOURS) - 1)]


def unmasking_view(trajectory: Trajectory, tokenizer: Any, block_size: int, console: Console) -> RenderableType:
    """One line per denoising step, then the whole text and the number of tokens of each round.

    In a line, the tokens of this step stand in their round's colour, or in brackets where there are no colours;
    `░` is a position still masked. Tokens behind the end token or the length limit were written and cut off.

    Of verified decoding a line is a draft and what its verification made of it: drafts that were kept, rejected ones
    with the verifier's token behind them, and tokens that are the verifier's own, each in a colour.
    """
    plain = console.color_system is None
    mask = "░" if console.encoding.startswith("utf") else "_"
    written = [*trajectory.response_ids.tolist(), *trajectory.tail_ids.tolist()]
    pieces = [_printable(tokenizer.decode([token])) for token in written]
    prompt_length = len(trajectory.prompt_ids)
    blocks = (prompt_length + np.arange(len(written))) // block_size
    rounds = trajectory.reveal_round
    origins = _origins(trajectory)
    drafts = [_printable(tokenizer.decode([token])) if token >= 0 else "" for token in trajectory.draft_ids.tolist()]

    steps = Table.grid(padding=(0, 1))
    for justify in ("right", "right", "right", "left"):
        steps.add_column(justify=justify, no_wrap=justify == "right", overflow="fold")
    steps.add_row(*(Text(heading, style="dim") for heading in ("step", "block", "round", "")))
    step = 0
    for block in np.unique(blocks):
        offsets = np.flatnonzero(blocks == block)
        known = trajectory.prompt_ids[int(block) * block_size :].tolist()  # the prompt's tail in the first block
        for round_ in range(int(rounds[offsets].max()) + 1):
            step += 1
            line = Text().append("".join(_printable(tokenizer.decode([token])) for token in known), style="dim")
            for offset in offsets:
                now, origin = int(rounds[offset]), origins[offset] if origins else None
                if origin and now == round_:
                    if origin == CORRECTED:
                        line.append(f"-{drafts[offset]}-" if plain else drafts[offset], style="dim strike")
                    piece = f"[{pieces[offset]}]" if plain and origin != OWN else pieces[offset]
                    line.append(piece, style=f"bold {_ORIGIN_COLOURS[origin]}")
                else:
                    line.append_text(_cell(pieces[offset], now, round_, mask, plain))
            first = round_ == 0
            number = Text(str(block) if first else "", style="dim")
            steps.add_row(Text(str(step), style="dim"), number, Text(str(round_), style=colour_of(round_)), line)

    text = Text(overflow="fold")
    for offset, piece in enumerate(pieces):
        cut = offset >= len(trajectory.response_ids)
        colour = _ORIGIN_COLOURS[origins[offset]] if origins else colour_of(int(rounds[offset]))
        text.append(piece, style="dim strike" if cut else colour)
    legend = _legend_of_origins(origins[: len(trajectory.response_ids)]) if origins else _legend(rounds)
    return Group(steps, Rule(style="dim"), Padding(text, (0, 1)), Padding(legend, (0, 1)))


def _origins(trajectory: Trajectory) -> list[str]:
    """Of verified decoding, where each token of response and tail comes from; of other rules nothing."""
    written = np.concatenate([trajectory.response_ids, trajectory.tail_ids])
    drafts = trajectory.draft_ids
    return [
        KEPT if draft == token else CORRECTED if draft >= 0 else OWN
        for draft, token in zip(drafts.tolist(), written[: len(drafts)].tolist(), strict=True)
    ]


def _legend_of_origins(origins: list[str]) -> Text:
    legend = Text(overflow="fold")
    for origin, colour in _ORIGIN_COLOURS.items():
        legend.append(f"{origin}: {origins.count(origin)}  ", style=colour)
    return legend


def _cell(piece: str, revealed: int, now: int, mask: str, plain: bool) -> Text:
    """A position at round `now`: masked, revealed in this round, or revealed earlier."""
    if revealed > now:
        return Text(mask, style="dim")
    if revealed < now:
        return Text(piece)
    return Text(f"[{piece}]" if plain else piece, style=f"bold {colour_of(now)}")


def _legend(rounds: np.ndarray) -> Text:
    legend = Text(overflow="fold")
    for round_, count in enumerate(np.bincount(rounds)):
        legend.append(f"round {round_}: {count}  ", style=colour_of(round_))
    return legend


def _printable(piece: str) -> str:
    """A token in one line without control characters."""
    return "".join(_VISIBLE.get(c, c if c.isprintable() else "�") for c in piece)
