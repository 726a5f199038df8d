"""Instructions are judged as lm_eval judges them; those that cannot be checked are counted apart."""

import pytest

from common.config.errors import ConfigError
from deploy.evaluation import ifeval
from deploy.evaluation.problems import Problem
from deploy.evaluation.scoring import score_all
from deploy.evaluation.suites import SUITES

ROWS = [
    ("no commas, please", ["punctuation:no_comma"], [{}]),
    ("three parts", ["detectable_format:number_highlighted_sections"], [{"num_highlights": 2}]),
    ("long", ["length_constraints:number_words"], [{"relation": "at least", "num_words": 5, "num_highlights": None}]),
    ("repeat me", ["combination:repeat_prompt", "punctuation:no_comma"], [{"prompt_to_repeat": "repeat me"}, {}]),
    ("in lower case", ["change_case:english_lowercase", "startend:quotation"], [{}, None]),
    ("a title", ["detectable_format:title", "keywords:existence"], [{}, {"keywords": ["sun", "moon"]}]),
    ("json", ["detectable_format:json_format"], [{}]),
]
RESPONSES = [
    "",
    "   ",
    "Yes, sure.",
    "*one* and *two* parts here are long",
    "repeat me\nthen the rest",
    '"all in lower case here and now"',
    "<<a title>>\nthe sun and the moon",
    'First line, to be dropped\n{"a": 1}',
    '```json\n{"a": 1}\n```',
]


def record(row: tuple) -> dict:
    return {"key": 1, "prompt": row[0], "instruction_id_list": row[1], "kwargs": row[2]}


def without_nones(row: dict) -> dict:
    return {**row, "kwargs": [arguments or {} for arguments in row["kwargs"]]}


@pytest.mark.parametrize("row", ROWS)
def test_scores_are_those_of_lm_eval(row):
    ifeval._checkers()
    from lm_eval.tasks.ifeval.utils import process_results

    for response in RESPONSES:
        theirs = process_results(without_nones(record(row)), [response])
        strict, loose = ifeval.followed(record(row), response)
        assert strict == theirs["inst_level_strict_acc"]
        assert loose == theirs["inst_level_loose_acc"]
        problem = Problem(0, "1", row[0], None, record(row))
        (score,) = score_all(SUITES["ifeval"], [problem], [response])
        assert score.ratios == {
            "instruction_strict": (sum(strict), len(strict)),
            "prompt_strict": (theirs["prompt_level_strict_acc"], 1),
            "instruction_loose": (sum(loose), len(loose)),
            "prompt_loose": (theirs["prompt_level_loose_acc"], 1),
        }


@pytest.mark.parametrize("response", ["", "One. Two, three.", "one"])
def test_instructions_that_lack_data_are_neither_followed_nor_failed(monkeypatch, response):
    monkeypatch.setattr(ifeval, "_lacks_data", {})
    from lm_eval.tasks.ifeval import instructions_util

    def missing(_):
        raise LookupError("punkt_tab")

    monkeypatch.setattr(instructions_util, "count_sentences", missing)
    row = record(
        (
            "two sentences",
            ["length_constraints:number_sentences", "punctuation:no_comma"],
            [{"relation": "at least", "num_sentences": 2}, {}],
        )
    )
    follows = bool(response) and "," not in response
    assert ifeval.followed(row, response) == ([None, follows], [None, follows])
    (score,) = score_all(SUITES["ifeval"], [Problem(0, "1", "", None, row)], [response])
    assert score.ratios["instruction_strict"] == (follows, 1)
    assert score.ratios["prompt_strict"] == score.ratios["prompt_loose"] == (0, 0)
    assert score.facts["unchecked"] == 1


def test_a_language_is_detected_the_same_each_time():
    row = record(("in German", ["language:response_language"], [{"language": "de"}]))
    found = {str(ifeval.followed(row, "ja no si")) for _ in range(20)}
    assert len(found) == 1


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(ifeval, "find_spec", lambda name: None if name in ("langdetect", "nltk") else name)
    with pytest.raises(ConfigError, match=r"langdetect, nltk not installed; install opdlm\[eval\]"):
        ifeval.check_installed()
