"""The original as the verifier, asked for by `opdlm generate`, `eval` and `serve`: the text is the original's."""

import asyncio
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from actors.evaluation.autoregressive import autoregressive_sampler, load_autoregressive
from actors.sampler.autoregressive import token_by_token
from actors.sampler.request import Request
from common.conversion import convert_folder
from common.end_tokens import response_text
from common.prompts import prompt_ids
from deploy.commands.serve import asked_in_file
from deploy.serving.asked import ChatAsk
from deploy.serving.jobs import Job
from deploy.serving.loading import load_server
from tests.models import tiny_qwen3
from tests.unit.test_adapter_option import QUESTION, adapter_of

MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("original"), seed=2)


def by_itself(path, limit: int = 24) -> str:
    """The original's greedy text, one token at a time."""
    model, tokenizer = load_autoregressive(path, "cpu")
    ids = prompt_ids(tokenizer, QUESTION)
    request = Request(0, 0, ids, limit)
    sampler = autoregressive_sampler(model, tokenizer, slots=1, compiled=False)
    (made,) = sampler.generate([request], token_by_token(0.0))
    return response_text(tokenizer, made.response_ids, sampler.eos_token_id)


def text_of(opdlm, *arguments) -> str:
    """The response that `opdlm generate` prints, in the records of a file."""
    status, _, err = opdlm("generate", *arguments)
    assert status == 0, err
    return json.loads(Path(arguments[-1]).read_text().splitlines()[-1])["response"]


def test_generate_and_eval_let_the_original_verify(opdlm, path, tmp_path):
    convert_folder(path, tmp_path / "block", 4, "auto", torch.float32)  # block-causal
    adapter = adapter_of(path, tmp_path / "adapter")
    original = by_itself(path)
    same = ("--rule", "speculative", "--max-new-tokens", 24, "--output")
    for folder, verify in ((tmp_path / "block", path), (adapter, "base"), (adapter, path)):
        output = tmp_path / f"{folder.name}-{Path(verify).name}.jsonl"
        assert text_of(opdlm, folder, QUESTION, "--verify", verify, *same, output) == original
    other = text_of(
        opdlm, adapter, QUESTION, "--rule", "static", "--max-new-tokens", 24, "--output", tmp_path / "o.jsonl"
    )
    assert other != original
    status, out, _ = opdlm("generate", adapter, QUESTION, "--rule", "speculative", "--verify", "base")
    assert status == 0
    said = rf"verified by {re.escape(path)}, which took \d+\.\d MiB beside the student"
    assert re.search(said, " ".join(out.split()))

    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"question": QUESTION, "answer": "5"}) + "\n")
    status, _, err = opdlm(
        "eval", adapter, "--verify", "base", "--original", path, "--problems", problems, "--rule", "speculative",
        "--max-new-tokens", 24, "--output", tmp_path / "eval.json",
    )  # fmt: skip
    assert status == 0, err
    records = [json.loads(line) for line in (tmp_path / "eval.problems.jsonl").read_text().splitlines()]
    assert len({record["response"] for record in records}) == 1 and len(records) == 2
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert {row["decoding"] for row in rows} == {"AR", "speculative 1 by original"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--verify", "base"), "--verify: 'base' is for the speculative rule; add --rule speculative, or leave it out"),
        (("--rule", "speculative", "--verify", "base"), "--verify: 'base' is the model of an adapter, and"),
        (("--rule", "speculative", "--verify", "nowhere/at/all"), "--verify: folder 'nowhere/at/all' does not exist"),
        (("--rule", "speculative"), "let the original verify (--verify of opdlm generate, eval and serve), train one"),
    ],
)
def test_options_that_name_no_original_are_refused(opdlm, path, tmp_path, options, said):
    convert_folder(path, tmp_path / "block", 4, "auto", torch.float32)
    status, _, err = opdlm("generate", tmp_path / "block", QUESTION, *options)
    assert status == 2 and said in " ".join(err.split())


def test_an_original_with_other_tokens_is_refused(opdlm, path, tmp_path):
    convert_folder(path, tmp_path / "block", 4, "auto", torch.float32)
    shutil.copytree(path, tmp_path / "other")
    tokens = json.loads((tmp_path / "other/tokenizer.json").read_text())
    added = tokens["added_tokens"][-1]
    tokens["added_tokens"][-1] = {**added, "content": "<|another|>"}
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokens))
    status, _, err = opdlm(
        "generate", tmp_path / "block", QUESTION, "--rule", "speculative", "--verify", tmp_path / "other"
    )
    assert status == 2 and "has other tokens than the student" in " ".join(err.split())


def test_an_original_with_fewer_positions_is_refused(opdlm, path, tmp_path):
    convert_folder(path, tmp_path / "block", 4, "auto", torch.float32)
    short = tiny_qwen3(tmp_path / "short", max_length=256)
    status, _, err = opdlm("generate", tmp_path / "block", QUESTION, "--rule", "speculative", "--verify", short)
    assert status == 2 and "has 256 positions and the student 512; give its original" in " ".join(err.split())


def test_serve_lets_the_original_verify_beside_other_rules(path, tmp_path):
    """Requests of the speculative rule share passes of their own; a swap of the student's weights leaves the text."""
    convert_folder(path, tmp_path / "block", 4, "auto", torch.float32)
    given = {"model": str(tmp_path / "block"), "verify": path, "slots": 2, "max_length": 256}
    server = load_server(asked_in_file(given).options)
    ids = prompt_ids(server.engine.tokenizer, QUESTION)

    async def made(rule: str) -> Job:
        settings = server.prompter.settings(ChatAsk(messages=MESSAGES, rule=rule))
        event = asyncio.Event()
        job = Job(Request(next(ordinals), 0, ids, 24, decoding=settings.decoding), 4, event)
        server.engine.submit([job])
        while not job.ended:
            await event.wait()
            event.clear()
        return job

    async def main() -> list[Job]:
        server.engine.start()
        jobs = [*await asyncio.gather(*map(made, ("speculative", "dynamic", "speculative")))]
        student = server.engine.model
        await asyncio.to_thread(server.engine.swap, [(name, p + 0.01) for name, p in student.named_parameters()])
        jobs.append(await made("speculative"))
        await asyncio.to_thread(server.engine.close)
        return jobs

    ordinals = iter(range(9))
    jobs = asyncio.run(main())
    ends = server.engine.end_tokens
    texts = [response_text(server.engine.tokenizer, job.trajectory.response_ids, ends) for job in jobs]
    assert texts[0] == texts[2] == texts[3] == by_itself(path) != texts[1]
    assert server.prompter.rules[-1] == "speculative"
