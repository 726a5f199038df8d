"""opdlm respond --keep best: right responses first, then the nearest to the student, a second try with a hint."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.teacher.overlap import STUDENT_BEST, OverlapActor
from common.config.file import load_config
from common.prompts import Prompt, load_prompts
from common.student import load_model, load_tokenizer
from deploy.best_responses import Candidates, hinted_prompts
from tests.models import tiny_qwen3


@pytest.fixture(scope="module")
def config():
    return load_config("tiny")


def prompts(*answers: str | None) -> list[Prompt]:
    return [Prompt(10 + i, f"q{i}", np.arange(3, dtype=np.int32), answer=a) for i, a in enumerate(answers)]


def table(asked: list[Prompt], *responses: str) -> pa.Table:
    each = len(responses) // len(asked)
    of = [p for p in asked for _ in range(each)]
    ids = pa.array([[i, i + 1] for i in range(len(of))], pa.list_(pa.int32()))
    answers = pa.array([p.answer for p in of], pa.string())
    return pa.table({"question": [p.question for p in of], "answer": answers, "response": list(responses),
                     "response_ids": ids})  # fmt: skip


def test_right_ones_come_first_and_nearness_decides_among_them(config):
    asked = prompts("4", "5", None)
    found = Candidates(
        config, asked, table(asked, "Answer: 4", "Answer: 7", "Answer: 5", "so Answer: 5", "Answer: 1", "Answer: 2"), 2
    )
    assert [p.question for p in found.unsolved] == ["q2"]
    compared = found.compared()
    assert list(compared) == [2, 3, 4, 5]  # one is right of the first prompt's, so nothing is compared there
    assert compared[3][0].tolist() == [0, 1, 2] and compared[3][1].tolist() == [3, 4]
    kept = found.kept({2: 0.5, 3: 0.75, 4: 0.5, 5: 0.5})
    assert kept["response"].to_pylist() == ["Answer: 4", "so Answer: 5", "Answer: 1"]
    assert kept["correct"].to_pylist() == [True, True, None]
    assert kept["overlap"].to_pylist() == [None, 0.75, 0.5]
    assert kept["hinted"].to_pylist() == [False] * 3


def test_a_second_try_is_kept_where_it_is_right(config):
    asked = prompts("4", "5", "6")
    found = Candidates(config, asked, table(asked, *["Answer: 1", "Answer: 2"] * 2, "Answer: 6", "Answer: 6"), 2)
    assert [p.question for p in found.unsolved] == ["q0", "q1"]
    found.try_again(asked[:2], table(asked[:2], "thus Answer: 4", "Answer: 9"))
    assert list(found.compared()) == [2, 3, 4, 5]
    kept = found.kept({2: 0.1, 3: 0.2, 4: 0.9, 5: 0.9})
    assert kept["response"].to_pylist() == ["thus Answer: 4", "Answer: 2", "Answer: 6"]
    assert kept["hinted"].to_pylist() == [True, False, False]
    assert kept["correct"].to_pylist() == [True, False, True]


def test_the_hint_stands_in_the_user_turn_and_only_there(tmp_path):
    file = tmp_path / "prompts.jsonl"
    worked = '"We add.\\n#### 5"'
    file.write_text(f'{{"question": "2+3?", "answer": {worked}}}\n{{"question": "Hello?"}}\n')
    template = '{"default": "Solve: {question}"}'
    config = load_config("tiny", ["--data.prompts", str(file), "--data.templates", template, "--data.epochs", "1"])
    tokenizer = load_tokenizer(tiny_qwen3(tmp_path / "model"))
    asked = load_prompts(config.data, tokenizer, None).prompts
    hinted = hinted_prompts(config, tokenizer, asked)
    assert list(hinted) == [0]
    plain = tokenizer.decode(asked[0].ids)
    assert tokenizer.decode(hinted[0].ids) == plain.replace("Solve: 2+3?", "Solve: 2+3?\n\n(Hint: the answer is 5.)")
    assert hinted_prompts(config, tokenizer, asked[1:]) == {}  # only what is asked for is tokenised
    assert "Hint" not in plain and hinted[0].question == asked[0].question


def test_nearness_is_the_share_of_tokens_among_the_students_best(tmp_path):
    path = tiny_qwen3(tmp_path, seed=1)
    config = load_config("tiny", ["--model.path", path, "--teacher.target", "hidden"])
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(5, 200, p).astype(np.int32), rng.integers(5, 200, n).astype(np.int32))
             for p, n in ((4, 9), (7, 5))]  # fmt: skip
    model = load_model(path, torch.float64, "sdpa")
    greedy = np.array([], np.int32)  # tokens of which all are among the best
    for _ in range(6):
        ids = torch.from_numpy(np.concatenate([pairs[0][0], greedy]).astype(np.int64))[None]
        greedy = np.append(greedy, np.int32(model(ids).logits[0, -1, :263].argmax()))
    pairs.append((pairs[0][0], greedy))
    expected = []
    for prompt, response in pairs:
        ids = np.concatenate([prompt, response]).astype(np.int64)
        logits = model(torch.from_numpy(ids)[None]).logits[0, :, :263]
        inside = [ids[i] in logits[i - 1].topk(STUDENT_BEST).indices for i in range(len(prompt), len(ids))]
        expected.append(sum(inside) / len(inside))
    assert expected[-1] == 1.0 and 0 <= min(expected) < 1
    np.testing.assert_allclose(OverlapActor(config, 263).overlap(pairs), expected)
