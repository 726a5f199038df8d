"""lm-evaluation-harness runs the student: its own runner, on tasks in tests/lm_eval_tasks and a local file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from actors.evaluation.generation import load_student, sampler_of
from actors.evaluation.likelihood import Estimate, log_likelihoods
from actors.sampler.request import Request
from actors.sampler.sampling import Decoding
from common.config.errors import ConfigError
from common.config.file import REPOSITORY
from common.config.unmasking import DynamicUnmasking
from common.conversion import convert_folder
from deploy.demo.word_problems import generate
from deploy.evaluation.lm_eval_model import BlockDiffusionLM

TASKS = Path(__file__).parents[1] / "lm_eval_tasks"
ARLM = str(REPOSITORY / "deploy/models/tiny-arlm")
PROBLEMS = 4


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("student") / "student"
    convert_folder(ARLM, out, 4, "<|mask|>", torch.float32)
    return str(out)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """The task files with the place of the problems written in."""
    folder = tmp_path_factory.mktemp("tasks")
    with (folder / "word_problems.jsonl").open("w") as file:
        for problem in generate(3, PROBLEMS, "heldout"):
            right = int(problem.answer)
            record = {
                "question": problem.question,
                "answer": problem.answer,
                "prompt": f"{problem.question} Answer:",
                "choices": [f" {right + 1}", f" {right}", f" {right + 2}"],
                "label": 1,
                "text": f"{problem.question} {problem.response}",
            }
            file.write(json.dumps(record) + "\n")
    for task in TASKS.glob("*.yaml"):
        (folder / task.name).write_text(
            task.read_text().replace("word_problems.jsonl", f"{folder}/word_problems.jsonl")
        )
    return folder


@pytest.fixture(autouse=True)
def no_shared_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def run(student: str, tasks: Path, names: list[str], **options: Any) -> dict[str, Any]:
    arguments = {"pretrained": student, **options.pop("model_args", {})}
    return simple_evaluate(
        "opdlm",
        model_args=arguments,
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )


def test_generation_task_by_the_harness_own_runner(student, tasks):
    result = run(student, tasks, ["opdlm_word_problems"], apply_chat_template=True, model_args={"threshold": 0.8})
    samples = result["samples"]["opdlm_word_problems"]
    assert len(samples) == PROBLEMS
    assert result["config"]["tokens_per_step"] > 1
    # the same texts as the sampler's own
    model, tokenizer = load_student(student, "float32", "cpu")
    sampler = sampler_of(model, tokenizer, block_size=None, slots=3)
    requests = []
    for index, sample in enumerate(samples):
        context = sample["arguments"][0][0]
        assert context.startswith("<|im_start|>user\n")
        assert context.endswith("<|im_start|>assistant\n")
        ids = np.asarray(tokenizer(context, add_special_tokens=False)["input_ids"], dtype=np.int32)
        requests.append(Request(index, 0, ids, 72))
    for trajectory in sampler.generate(requests, Decoding(DynamicUnmasking(threshold=0.8), 0.0)):
        text = tokenizer.decode(trajectory.response_ids, skip_special_tokens=True).split("\n\n")[0]
        assert samples[trajectory.ordinal]["resps"][0][0] == text


@pytest.mark.parametrize("likelihood", ["sequential", "bound"])
def test_likelihood_tasks_by_the_harness_own_runner(student, tasks, likelihood):
    names = ["opdlm_word_problems_choice", "opdlm_word_problems_perplexity"]
    result = run(student, tasks, names, model_args={"likelihood": likelihood, "mc_samples": 15})
    choices = result["samples"]["opdlm_word_problems_choice"]
    assert 0 <= result["results"][names[0]]["acc,none"] <= 1
    model, tokenizer = load_student(student, "float32", "cpu")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    pairs = []
    for sample in choices:
        pairs += [(encode(context), encode(continuation)) for context, continuation in sample["arguments"]]
    direct = log_likelihoods(
        model,
        pairs,
        block_size=4,
        mask_token_id=model.config.mask_token_id,
        estimate=Estimate(likelihood, 15),
    )
    reported = [float(response[0][0]) for sample in choices for response in sample["resps"]]
    np.testing.assert_allclose(reported, [d.log_prob for d in direct], atol=1e-4)

    found = result["results"][names[1]]
    texts = [sample["doc"]["text"] for sample in result["samples"][names[1]]]
    pairs = [([tokenizer.eos_token_id], encode(text)) for text in texts]
    total = sum(
        d.log_prob
        for d in log_likelihoods(
            model, pairs, block_size=4, mask_token_id=model.config.mask_token_id, estimate=Estimate(likelihood, 15)
        )
    )
    expected = -total / np.log(2) / sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)


def test_long_texts_are_scored_in_windows_token_by_token_once(student):
    lm = BlockDiffusionLM(student, max_length=16)
    text = "Tom has 5 apples and buys 4 more. How many now?"
    windows = list(lm._windows(text))
    assert len(windows) > 2
    assert [i for _, scored in windows for i in scored] == lm.tok_encode(text)
    assert max(len(context) + len(scored) for context, scored in windows) <= 16
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    assert lm.loglikelihood_rolling([request])[0] < 0


def test_sampled_generation_is_seeded_and_differs_between_calls(student):
    arguments = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    requests = [Instance("generate_until", {}, ("Tom has", arguments), 0) for _ in range(2)]
    lm = BlockDiffusionLM(student, seed=1)
    first, again = lm.generate_until(requests), lm.generate_until(requests)
    assert first[0] != first[1]
    assert first != again
    assert BlockDiffusionLM(student, seed=1).generate_until(requests) == first


def test_a_text_has_as_many_tokens_as_were_asked_for(student):
    lm = BlockDiffusionLM(student, block_size=16)
    arguments = {"until": [], "max_gen_toks": 5}
    (text,) = lm.generate_until([Instance("generate_until", {}, ("Tom has", arguments), 0)])
    assert 1 <= len(lm.tok_encode(text)) <= lm.response_tokens <= 5


def test_texts_end_before_the_first_stop_string_and_so_does_decoding(student):
    def generate(*until: str) -> tuple[str, int]:
        lm = BlockDiffusionLM(student, rule="static")
        arguments = {"until": list(until), "max_gen_toks": 32}
        (text,) = lm.generate_until([Instance("generate_until", {}, ("Tom has", arguments), 0)])
        return text, lm.denoise_forwards

    whole, forwards = generate()
    text, fewer = generate(whole[5:8])
    assert text == whole[: whole.find(whole[5:8])]
    assert fewer < forwards


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rule": "best"}, "rule='best' is unknown"),
        ({"likelihood": "exact"}, "choose sequential, bound"),
        ({"thresold": 0.9}, "unknown.*thresold"),
        ({"pretrained": ARLM}, "convert it first"),
    ],
)
def test_bad_arguments_are_refused(student, arguments, said):
    with pytest.raises(ConfigError, match=said):
        BlockDiffusionLM(**{"pretrained": student, **arguments})


def test_the_command_line_knows_the_model(student, tasks, tmp_path):
    command = [sys.executable, "-m", "deploy", "lm_eval", "--model", "opdlm", "--model_args", f"pretrained={student}"]
    command += ["--include_path", str(tasks), "--tasks", "opdlm_word_problems_choice", "--limit", "2"]
    command += ["--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "opdlm_word_problems_choice" in done.stdout
    (file,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(file.read_text())["config"]["likelihood"] == "sequential"
