"""The model card of an exported folder, and pushing it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard

from common.config.file import load_config
from common.conversion import convert_folder
from tests.models import tiny_family

OWN_CARD = "---\nlicense: apache-2.0\n---\n# An ARLM\n"
MEASURED = {"tokens_per_step": 2.25, "problems": 200}
SUMMARY = {
    "teacher": {"exact_match": 1.0, "tokens_per_step": 1.0, "problems": 200},
    "student": {"static": {"exact_match": 0.93, **MEASURED}, "dynamic": {"exact_match": 0.925, **MEASURED}},
    "held_out_kl_init": {"mean": 2.5},
    "held_out_kl": {"mean": 0.125},
}


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run with a final checkpoint, and an earlier one."""
    arlm = tiny_family(tmp_path / "my-arlm", "llama")
    (tmp_path / "my-arlm/README.md").write_text(OWN_CARD)
    final = tmp_path / "run/checkpoints/final"
    convert_folder(arlm, final, 4, "auto", torch.float32)
    config = load_config("tiny", ["--model.path", arlm, "--objective.clip_nats", "3.5", "--output_dir", str(tmp_path)])
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (tmp_path / "run/summary.json").write_text(json.dumps(SUMMARY))
    rows = [{"batch": batch, "kl": kl} for batch, kl in ((0, 2.5), (1, 0.75), (2, 0.5))]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (final / "manifest.json").write_text(json.dumps({"batches": 3, "updates": 160, "response_tokens": 7318}))
    shutil.copytree(final, final.with_name("batch-000002"))
    (final.with_name("batch-000002") / "manifest.json").write_text(
        json.dumps({"batches": 2, "updates": 80, "response_tokens": 4000})
    )
    return tmp_path / "run"


def card_of(folder: Path) -> str:
    text = (folder / "README.md").read_text()
    assert str(folder.parent) not in text, "no path of this machine"
    return text


def test_a_card_says_what_the_run_says(opdlm, tmp_path, run):
    assert opdlm("export", run / "checkpoints/final", tmp_path / "mine")[0] == 0
    text = card_of(tmp_path / "mine")
    card = ModelCard(text)
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    for row in (
        "| base model | my-arlm |",
        "| method | on-policy distillation (OPDLM, arXiv 2606.06712): source student, state per_block, target teacher, "
        "divergence forward_kl |",
        "| prompts | word_problems_train.jsonl |",
        "| response tokens | 7,318 |",
        "| divergence of the last rollout batch, nats/token | 0.5 |",
        "| held-out KL before the training, nats/token | 2.5 |",
        "| held-out KL, nats/token | 0.125 |",
        "| original | autoregressive, greedy | 100.0% | 1.00 | 200 |",
        "| this model | dynamic | 92.5% | 2.25 | 200 |",
    ):
        assert row in text, row
    assert "clip_nats: 3.5" in text and 'AutoModelForCausalLM.from_pretrained("mine", trust_remote_code=True)' in text
    assert "`apache-2.0`, as my-arlm states it" in text
    saved = json.loads((tmp_path / "mine/config.json").read_text())
    assert saved["origin"].startswith("student of my-arlm, made by opdlm")


def test_a_checkpoint_before_the_end_has_its_own_counters_and_no_scores(opdlm, tmp_path, run):
    assert opdlm("export", run / "checkpoints/batch-000002", tmp_path / "mine")[0] == 0
    text = card_of(tmp_path / "mine")
    assert "| response tokens | 4,000 |" in text and "nats/token | 0.75 |" in text
    assert "## Scores" not in text and "held-out" not in text


def test_a_student_of_no_run_has_a_card(opdlm, tmp_path, run):
    shutil.copytree(run / "checkpoints/final", tmp_path / "copied")
    assert opdlm("export", tmp_path / "copied", tmp_path / "mine")[0] == 0
    text = card_of(tmp_path / "mine")
    assert "a student, made by opdlm" in text and "## Training" not in text
    assert ModelCard(text).data.license is None and "do not name it" in text
    assert ModelCard(text).data.base_model is None


def test_a_card_names_the_base_model_as_others_know_it(opdlm, tmp_path, run):
    shutil.copytree(run / "checkpoints/final", tmp_path / "copied")
    named = ["--base", "me/an-arlm", "--license", "mit"]
    for student, out in ((run / "checkpoints/final", "mine"), (tmp_path / "copied", "other")):
        assert opdlm("export", student, tmp_path / out, *named)[0] == 0
        text = card_of(tmp_path / out)
        assert (ModelCard(text).data.base_model, ModelCard(text).data.license) == ("me/an-arlm", "mit")
        assert "a student of me/an-arlm, made by opdlm" in text and "my-arlm" not in text
        assert "derived from me/an-arlm. Licence: `mit`." in text
        assert ("| base model | me/an-arlm |" in text) == (out == "mine")


def test_scores_come_from_a_file_of_opdlm_eval_and_a_card_is_written_anew(opdlm, tmp_path, run):
    assert opdlm("export", run / "checkpoints/final", tmp_path / "mine")[0] == 0
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "mine").iterdir()}
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "2 + 2?", "answer": "4"}\n')
    results = tmp_path / "eval.json"
    status, _, err = opdlm(
        "eval", run / "checkpoints/final", "--problems", problems, "--max-new-tokens", 4, "--rule", "static",
        "--output", results,
    )  # fmt: skip
    assert status == 0, err
    again = ["export", run / "checkpoints/final", tmp_path / "mine", "--card-only"]
    assert opdlm(*again, "--eval", results, "--license", "mit")[0] == 0
    text = card_of(tmp_path / "mine")
    assert "| problems | this model | static 1 | 0.0%" in text and "## Scores\nBy `opdlm eval`" in text
    assert ModelCard(text).data.license == "mit"
    changed = {p.name for p in (tmp_path / "mine").iterdir() if p.stat().st_mtime_ns != before[p.name]}
    assert changed == {"README.md"}


def test_what_is_no_results_file_and_no_exported_folder_is_refused(opdlm, tmp_path, run):
    final = run / "checkpoints/final"
    for arguments, said in (
        (["--eval", final / "config.json"], "--eval: "),
        (["--eval", tmp_path / "none.json"], "--eval: "),
        (["--card-only"], "is no exported folder"),
        (["--push", "a/b/c"], "--push: 'a/b/c' is no repository"),
        (["--base", "/models/arlm"], "--base: '/models/arlm' is no repository"),
    ):
        status, out, err = opdlm("export", final, tmp_path / "mine", *arguments)
        assert (status, out) == (2, "") and said in err
        assert not (tmp_path / "mine").exists()


def test_pushing_without_a_hub_says_how_to_upload_later(opdlm, tmp_path, run):
    """The tests are offline."""
    status, out, err = opdlm("export", run / "checkpoints/final", tmp_path / "mine", "--push", "me/mine")
    assert status == 2 and "wrote" in out
    last = err.splitlines()[-1]
    assert last.startswith("error: --push: 'me/mine' could not be written (")
    assert last.endswith(f"upload it with hf upload me/mine {tmp_path / 'mine'}")
    assert (tmp_path / "mine/model.safetensors").is_file()
    assert 'from_pretrained("me/mine"' in card_of(tmp_path / "mine")


def test_the_whole_folder_is_pushed_in_one_commit(opdlm, tmp_path, run, monkeypatch):
    """With the hub's two calls recorded: there is no hub here."""
    made, uploaded = [], {}

    def create_repo(self, repository, private, exist_ok):
        made.append((repository, private, exist_ok))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        uploaded[repo_id] = sorted(p.name for p in folder_path.iterdir())

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    arguments = ["export", run / "checkpoints/final", tmp_path / "mine", "--push", "me/mine", "--private"]
    status, out, _ = opdlm(*arguments)
    assert (status, "pushed to https://huggingface.co/me/mine" in out) == (0, True)
    assert made == [("me/mine", True, True)]
    code = {"block_diffusion.py", "modeling_opdlm.py"}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", *code} <= set(uploaded["me/mine"])
