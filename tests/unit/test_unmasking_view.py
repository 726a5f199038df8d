"""The steps of a trajectory in the terminal."""

import io

import numpy as np
from rich.console import Console

from common.trajectory import Trajectory
from deploy.commands.unmasking_view import colour_of, unmasking_view


class Letters:
    """A tokenizer whose token 7 is a line break and 8 an escape."""

    def decode(self, ids: list[int]) -> str:
        return "".join({7: "\n", 8: "\x1b[31m"}.get(i, chr(i)) for i in ids)


def trajectory() -> Trajectory:
    """Prompt `ab` and response `Hi` in block 0, then two rounds, an end token and a tail in block 1."""
    return Trajectory(
        ordinal=0,
        sample=0,
        prompt_ids=np.array([97, 98], dtype=np.int32),
        response_ids=np.array([72, 105, 7, 33], dtype=np.int32),
        tail_ids=np.array([63, 8], dtype=np.int32),
        reveal_round=np.array([0, 0, 1, 0, 0, 2], dtype=np.int16),
        confidence=np.ones(6, dtype=np.float32),
        weights_version=0,
        finish_reason="eos",
        denoise_forwards=4,
        commit_forwards=1,
    )


def shown(**options: object) -> str:
    console = Console(file=io.StringIO(), width=80, **options)  # type: ignore[arg-type]
    console.print(unmasking_view(trajectory(), Letters(), 4, console))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_plain_output_brackets_what_each_step_revealed():
    lines = [line.split() for line in shown().splitlines()]
    assert lines[1:5] == [
        ["1", "0", "0", "ab[H][i]"],
        ["2", "1", "0", "░[!][?]░"],
        ["3", "1", "[⏎]!?░"],
        ["4", "2", "⏎!?[�[31m]"],
    ]
    assert lines[-1] == ["round", "0:", "4", "round", "1:", "1", "round", "2:", "1"]
    assert "\x1b" not in shown()
    assert max(len(line) for line in shown().splitlines()) <= 80


def test_colours_by_round_on_a_terminal():
    text = shown(force_terminal=True, color_system="standard")
    assert "\x1b[1;32mH" in text  # revealed in round 0: bold green
    assert "\x1b[1;36m⏎" in text  # in round 1: bold cyan
    assert "[H]" not in text
    assert "\x1b[31m" not in text  # an escape of the model's does not reach the terminal


def test_later_rounds_share_a_colour():
    assert colour_of(0) != colour_of(1)
    assert colour_of(40) == colour_of(400)


def test_verified_decoding_shows_what_became_of_drafts():
    t = trajectory()
    t.draft_ids = np.array([-1, 105, -1, 35, 63, -1], dtype=np.int32)  # i is kept, # became !, the first is its own
    t.reveal_round = np.array([0, 0, 0, 0, 1, 1], dtype=np.int16)

    def of(**options: object) -> str:
        console = Console(file=io.StringIO(), width=80, **options)  # type: ignore[arg-type]
        console.print(unmasking_view(t, Letters(), 4, console))
        return console.file.getvalue()  # type: ignore[attr-defined]

    plain = of(color_system=None)
    assert "abH[i]" in plain and "⏎-#-[!]░░" in plain
    assert "drafted and kept: 1  corrected: 1  the verifier's own: 2" in plain
    coloured = of(color_system="standard", force_terminal=True)
    for colour, letter in ((32, "i"), (31, "!"), (36, "H")):
        assert f"\x1b[1;{colour}m{letter}" in coloured
