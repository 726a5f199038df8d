"""What ends a run before any process starts, each with field, value and remedy."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from common.config.errors import ConfigError
from common.config.file import load_config
from deploy import preflight
from deploy.data_fingerprint import data_fingerprints
from deploy.held_out import HeldOutPrompts
from deploy.model_checks import looks_local
from deploy.pipeline import write_resolved_config
from tests.models import tiny_qwen3, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(model, tmp_path):
    """A model folder of the test's own, to be broken."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


def config(tmp_path, *overrides: str):
    small = [
        "--data.limit",
        "4",
        "--rollout.prompts_per_batch",
        "4",
        "--evaluation.count",
        "2",
        "--teacher.backend",
        "transformers",
    ]
    return load_config("tiny", ["--output_dir", str(tmp_path / "runs"), *small, *overrides])


def refused(settings) -> str:
    with pytest.raises(ConfigError) as error:
        preflight.prepare(settings)
    return str(error.value)


def edit(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_good_run_gets_its_prompts_and_problems(tmp_path):
    prepared = preflight.prepare(config(tmp_path, "--data.epochs", "2"))
    prompts, problems = prepared.prompts, prepared.problems
    assert [p.ordinal for p in prompts.prompts] == list(range(8))
    assert [p.ordinal for p in problems] == [0, 1]
    assert all(p.answer for p in problems)
    assert preflight.prepare(config(tmp_path, "--evaluation.problems", "null")).problems == []


@pytest.mark.parametrize("field", ["model.path", "teacher.path"])
def test_a_missing_model_folder(tmp_path, field):
    said = refused(config(tmp_path, f"--{field}", str(tmp_path / "nope")))
    assert said.startswith(f"{field}: folder '{tmp_path}/nope' does not exist; give a")


def test_a_folder_that_is_no_causal_lm(tmp_path, copy):
    path = ["--model.path", str(copy)]
    edit(copy, architectures=["BertModel"])
    assert "is BertModel, not a causal LM" in refused(config(tmp_path, *path))
    edit(copy, architectures=["Gemma2ForCausalLM"], model_type="gemma2")
    assert "model_type 'gemma2', which soft-caps its logits (attn_logit_softcapping 50.0)" in refused(
        config(tmp_path, *path)
    )
    (copy / "model.safetensors").unlink()
    assert "holds no .safetensors file" in refused(config(tmp_path, *path))
    (copy / "config.json").write_text("{")
    assert "has config.json that is not a JSON object" in refused(config(tmp_path, *path))
    (copy / "config.json").unlink()
    assert "has no config.json" in refused(config(tmp_path, *path))


def test_teacher_and_student_with_different_tokenizers(tmp_path, model, copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(copy)
    said = refused(config(tmp_path, "--model.path", model, "--teacher.path", str(copy)))
    assert "have different tokenizers" in said
    assert f"teacher.path {str(copy)!r}" in said


def test_no_row_for_a_mask_token(tmp_path, copy):
    tokenizer_config = json.loads((copy / "tokenizer_config.json").read_text())
    tokenizer_config.pop("mask_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    overrides = ["--model.path", str(copy), "--model.mask_token", "<|new|>"]
    assert preflight.prepare(config(tmp_path, *overrides))
    edit(copy, vocab_size=263)
    assert "has no token '<|new|>' and no spare row for it: all 263 rows" in refused(config(tmp_path, *overrides))


def test_a_tokenizer_without_chat_template(tmp_path, copy):
    """It is asked with the user's text alone, and somebody is told; or with a template that is given."""
    template = copy / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    raw = preflight.prepare(config(tmp_path, "--model.path", str(copy)))
    assert any("the tokenizer has no chat template" in warning for warning in raw.warnings)
    first = raw.prompts.prompts[0]
    assert raw.tokenizer.decode(first.ids) == first.question
    (tmp_path / "mine.jinja").write_text(text)
    for given in (text, str(tmp_path / "mine.jinja")):
        chat = preflight.prepare(config(tmp_path, "--model.path", str(copy), "--data.chat_template", given))
        assert chat.warnings == []
        assert chat.tokenizer.decode(chat.prompts.prompts[0].ids).startswith("<|im_start|>user\n" + first.question)
    with pytest.raises(ConfigError, match=r"data.chat_template: 'nope.jinja' is neither a file nor a Jinja template"):
        config(tmp_path, "--data.chat_template", "nope.jinja")


def test_a_prompt_with_a_token_for_which_there_is_no_row(tmp_path):
    model = tiny_qwen3(tmp_path / "model", tokenizer=tiny_tokenizer("<|mask|>", "<image>"), vocab=263)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "What is <image>?", "answer": "1"}\n')
    paths = ["--model.path", model, "--data.prompts", str(file), "--evaluation.problems", "null"]
    assert refused(config(tmp_path, *paths)) == (
        "data.prompts: 'What is <image>?' holds the token '<image>', for which the model has no row in its embedding; "
        "remove the prompt"
    )


@pytest.mark.parametrize("field", ["data.prompts", "evaluation.problems"])
def test_broken_prompt_files_are_named_by_their_field(tmp_path, field):
    file = tmp_path / "rows.jsonl"
    assert refused(config(tmp_path, f"--{field}", str(file))).startswith(f"{field}: '{file}' does not exist")
    file.write_text('{"question": "a", "answer": "1"}\n{"question"\n')
    assert refused(config(tmp_path, f"--{field}", str(file))).startswith(f"{field}: {file}, line 2: not valid JSON")


def test_problems_without_answers(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "1"}\n{"question": "b"}\n')
    prepared = preflight.prepare(config(tmp_path, "--evaluation.problems", str(file)))
    assert [p.question for p in prepared.problems] == ["a"]
    assert "1 problems dropped: no answer (missing, empty, null or NaN)" in prepared.prompts.notes
    said = refused(config(tmp_path, "--evaluation.problems", str(file), "--evaluation.split", "test"))
    assert said.endswith("is one file; set evaluation.split and evaluation.subset to null")
    file.write_text('{"question": "b", "answer": null}\n')
    said = refused(config(tmp_path, "--evaluation.problems", str(file)))
    assert said.startswith(f"evaluation.problems: '{file}': none of 1 rows can be used (1 no answer")
    assert "set data.answer_field ('answer') to the field that holds them" in said


def test_prompts_and_responses_longer_than_the_model(tmp_path):
    said = refused(config(tmp_path, "--curriculum.max_tokens", "512"))
    assert said.startswith("curriculum.max_tokens: 512 after the longest prompt of data.prompts")
    assert "the models have 512; lower curriculum.max_tokens to" in said
    assert "evaluation.max_new_tokens: 500 after" in refused(config(tmp_path, "--evaluation.max_new_tokens", "500"))


def test_more_cpus_or_gpus_than_there_are(tmp_path):
    said = refused(config(tmp_path, "--ray.num_cpus", "1"))
    assert "asks for 1.75 CPUs" in said
    assert "Ray has 1" in said
    no_cuda = refused(config(tmp_path, "--learner.resources.gpus", "1"))
    assert "asks for 2 GPUs, but torch" in no_cuda and "install opdlm[cuda]" in no_cuda
    assert preflight.prepare(config(tmp_path, "--ray.num_cpus", "1", "--ray.address", "auto"))
    shared = ["--learner.resources.gpus", "0.5", "--ray.address", "auto"]
    assert "several ranks on one GPU" in refused(config(tmp_path, *shared))


def test_a_teacher_engine_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    assert "use --teacher.backend transformers" in refused(config(tmp_path, "--teacher.backend", "vllm"))


def test_a_rollout_batch_larger_than_the_prompts(tmp_path):
    said = refused(config(tmp_path, "--data.epochs", "2", "--rollout.prompts_per_batch", "9"))
    assert said == (
        "rollout.prompts_per_batch: 9 is more than the 8 prompts to train on (data.prompts, data.limit, "
        "data.epochs); use 8 or less"
    )
    preflight.prepare(config(tmp_path, "--data.epochs", "2", "--rollout.prompts_per_batch", "8"))


HELD_OUT = ["--evaluation.held_out_prompts", "3"]


def test_held_out_prompts_are_checked_like_the_others(tmp_path):
    prepared = preflight.prepare(config(tmp_path, *HELD_OUT))
    assert len(prepared.prompts.held_out) == 3 and prepared.evaluates
    assert "evaluation.held_out_prompts" in data_fingerprints(prepared.config, prepared.prompts)
    said = refused(config(tmp_path, *HELD_OUT, "--evaluation.held_out_tokens", "100000"))
    assert said.startswith("evaluation.held_out_tokens: 100000 after the longest prompt of data.prompts (")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"question": f"What is {n} + 1?"}) + "\n" for n in range(5)))
    few_prompts = ["--data.prompts", str(few), "--data.limit", "null", "--data.epochs", "1"]
    said = refused(config(tmp_path, *HELD_OUT, *few_prompts))
    assert said.endswith(
        "4 is more than the 2 prompts to train on (data.prompts, data.limit, data.epochs, "
        "evaluation.held_out_prompts); use 2 or less"
    )
    said = refused(config(tmp_path, *few_prompts, "--evaluation.held_out_prompts", "5"))
    assert said.startswith(f"data.prompts: '{few}' has 5 different prompts") and said.endswith("to 4 or less")


def test_a_run_that_goes_on_holds_out_the_prompts_that_it_has_kept(tmp_path):
    prepared = preflight.prepare(config(tmp_path, *HELD_OUT, "--data.limit", "40"))
    write_resolved_config(prepared.config)
    kept = prepared.prompts.prompts[:3]  # of a run whose source had another order
    HeldOutPrompts(kept, prepared.config.run_dir, "teacher", 72).keep([p.ids for p in kept])
    again = preflight.prepare(prepared.config, resume=True).prompts
    assert [p.ids.tolist() for p in again.held_out] == [p.ids.tolist() for p in kept]
    assert not {p.question for p in kept} & {p.question for p in again.prompts}
    changed = config(tmp_path, "--data.limit", "40", "--evaluation.held_out_prompts", "2")
    with pytest.raises(ConfigError, match=r"evaluation\.held_out_prompts was 3 and is 2"):
        preflight.prepare(changed, resume=True)
    (prepared.config.run_dir / "held_out.json").write_text('{"made')
    with pytest.raises(ConfigError, match=r"held_out\.json' cannot be read \(.*\); remove it"):
        preflight.prepare(prepared.config, resume=True)


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("Qwen/Qwen3-8B", False),
        ("deploy/models/x", True),
        ("./x", True),
        ("/x/y", True),
        ("tests/nope", True),
        ("x", True),
    ],
)
def test_hub_ids_are_told_from_folders(path, local):
    assert looks_local(path) is local
