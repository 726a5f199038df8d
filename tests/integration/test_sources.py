"""Off-policy training on CPU: the teacher's responses to a file, then SFT without a teacher, and a mixture with one, to
which a second loss on the teacher's responses is added."""

import json
from collections import Counter

import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from common.config.errors import ConfigError
from common.config.file import load_config
from common.trajectory import from_batch, read_spool
from deploy import cli
from deploy.pipeline import run
from deploy.respond import respond

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

BATCHES = 4
SMALL = [
    "--pipeline.max_batches", str(BATCHES), "--pipeline.spool", "true", "--rollout.prompts_per_batch", "16",
    "--evaluation.problems", "null", "--learner.warmup_batches", "1", "--data.limit", "48",
    "--teacher.backend", "transformers", "--curriculum.schedule", "constant",
]  # fmt: skip

EXTRA = ["--objective.extra", '[{"source": {"kind": "offline"}, "state": {"kind": "random"}, "weight": 0.5}]']


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    """Made by vLLM in one go; an interrupted command leaves parts, which are not made again."""
    file = tmp_path_factory.mktemp("responses") / "responses.parquet"
    command = ["respond", "tiny", "--output", str(file), "--samples", "2", "--max-new-tokens", "40"]
    command += ["--temperature", "0.5", *SMALL, "--teacher.backend", "vllm"]
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert result.exit_code == 0 and "1 of 1 parts" in result.output and "96 responses" in result.output, result.output
    rows = parquet.read_table(file).to_pylist()
    assert len({r["question"] for r in rows}) == 48
    assert sum(r["answer"] in r["response"] for r in rows) > 80
    config = load_config("tiny", SMALL)
    options = {"samples": 2, "max_new_tokens": 40, "temperature": 0.5, "top_p": 1.0}
    notes: list[str] = []
    with pytest.raises(ConfigError, match="exists"):
        respond(config, file, **options, note=notes.append)

    again = file.with_name("again.parquet")
    parts = file.with_name("again.parquet.parts")
    parts.mkdir()
    parquet.write_table(parquet.read_table(file).slice(0, 5), parts / "part-000000.parquet")
    assert respond(config, again, **options, note=notes.append)["responses"] == 5
    return file


def test_the_best_responses(tmp_path, responses):
    """Chosen from those that are there, with second tries, and read by the student."""
    parts = tmp_path / "best.parquet.parts"
    parts.mkdir()
    parquet.write_table(parquet.read_table(responses), parts / "part-000000.parquet")
    options = {"samples": 2, "max_new_tokens": 40, "temperature": 0.5, "top_p": 1.0, "keep": "best"}
    file = tmp_path / "best.parquet"
    counts = respond(load_config("tiny", SMALL), file, **options, note=print)
    kept = parquet.read_table(file).to_pylist()
    of_question = {r["question"]: [] for r in parquet.read_table(responses).to_pylist()}
    for row in parquet.read_table(responses).to_pylist():
        of_question[row["question"]].append(row)
    assert counts["responses"] == len({r["question"] for r in kept}) == 48
    for row in kept:
        others = of_question[row["question"]]
        solved = any(r["response"].endswith(f": {row['answer']}") for r in others)
        assert row["hinted"] or row["correct"] == solved
        assert row["hinted"] or row["response_ids"] in [r["response_ids"] for r in others]
    assert counts["share_correct"] == sum(r["correct"] for r in kept) / 48 > 0.8
    assert any(r["overlap"] is not None and 0 < r["overlap"] <= 1 for r in kept)


@pytest.mark.parametrize(
    ("overrides", "offline"),
    [
        (["--objective.method", "sft", "--objective.weight", "inverse_t"], [1.0] * BATCHES),
        (
            [
                "--objective.source.kind",
                "mixture",
                "--objective.source.batches",
                "3",
                "--teacher.target",
                "topk",
                *EXTRA,
            ],
            [1.0, None, None, 0.5],
        ),
    ],
    ids=["sft", "mixture"],
)
def test_training_on_offline_responses(tmp_path, responses, overrides, offline):
    config = load_config(
        "tiny", ["--output_dir", str(tmp_path), *SMALL, "--data.responses", str(responses), *overrides]
    )
    run(config)
    folder = tmp_path / "tiny"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["kl"] < metrics[0]["kl"]
    assert all(m["staleness"] == 0 for m in metrics)
    for m, share in zip(metrics, offline, strict=True):
        assert m["offline_share"] == share if share is not None else 0 < m["offline_share"] < 1
    known = {tuple(r["response_ids"]) for r in parquet.read_table(responses).to_pylist()}
    for index, m in enumerate(metrics):
        batches = read_spool(folder / "spool" / f"batch-{index:06d}.arrow")
        rows = [t for batch in batches for t in from_batch(batch)[0]]
        losses = 1 + len(config.objective.extra)
        assert Counter(t.sample for t in rows) == dict.fromkeys(range(losses), 16)
        assert sum(t.is_offline for t in rows) == round(16 * losses * m["offline_share"])
        assert all(tuple(t.response_ids.tolist()) in known for t in rows if t.is_offline and t.finish_reason == "eos")
        kinds = {from_batch(batch)[1].target_kind for batch in batches}
        if losses > 1:
            assert all(t.is_offline for t in rows if t.sample)
            assert m["loss"] == pytest.approx(m["part/0/loss"] + m["part/1/loss"]) and m["part/1/kl"] > 0
        assert kinds == {"none" if config.objective.target.kind == "hard" else "topk"}
