"""Files, presets and overrides become a config, or an error that names field, value and remedy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config.divergences import JensenShannon, MixedKL
from common.config.errors import ConfigError
from common.config.file import REPOSITORY, load_config, parse_overrides
from common.config.run import RunConfig
from common.config.states import SuffixState
from common.config.unmasking import DynamicUnmasking, StaticUnmasking
from common.config.yaml_loader import Scalar

MINIMAL = "model: {path: deploy/models/tiny-arlm}\ndata: {prompts: questions.jsonl}\n"


@pytest.fixture
def minimal(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    return str(file)


def fails(source: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(source, list(overrides))
    return str(error.value)


def test_overrides_take_both_spellings_and_yaml_values(minimal):
    config = load_config(
        minimal,
        [
            "--learner.lr=2e-4",
            "--learner.betas", "[0.9, 0.95]",
            "--learner.gradient_checkpointing", "false",
            "--pipeline.max_batches=null",
            "--data.domain_max_tokens", "{math: 64}",
            "--data.domain_max_tokens.my-code", "32",
            "--learner.deepspeed.zero_optimization.offload_optimizer.device", "cpu",
        ],
    )  # fmt: skip
    assert config.learner.lr == 2e-4
    assert config.learner.betas == (0.9, 0.95)
    assert config.learner.gradient_checkpointing is False
    assert config.pipeline.max_batches is None
    assert config.data.domain_max_tokens == {"math": 64, "my-code": 32}
    assert config.learner.deepspeed == {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-05", "+1e-5", "0.00001", ".00001"])
def test_every_spelling_of_a_number_is_a_number(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(f"{MINIMAL}learner: {{lr: {text}, deepspeed: {{some_key: {text}}}}}\n")
    config = load_config(str(file))
    assert config.learner.lr == 1e-5
    assert config.learner.deepspeed["some_key"] == 1e-5


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_floats_survive_the_command_line(value):
    [(_, parsed)] = parse_overrides(["--learner.lr", repr(value)])
    assert parsed == Scalar(repr(value), value)
    assert isinstance(parsed.value, float)


@pytest.mark.parametrize("name", ["7", "on", "no", "2026-01-31", "1.5"])
def test_names_stay_text(minimal, name):
    assert load_config(minimal, ["--name", name]).name == name


def test_a_new_rule_drops_the_old_rules_fields_but_no_override():
    overrides = ["--rollout.unmasking.steps_per_block", "2", "--rollout.unmasking.rule", "static"]
    assert load_config("tiny", overrides).rollout.unmasking == StaticUnmasking(steps_per_block=2)
    same = load_config("tiny", ["--rollout.unmasking.rule", "dynamic"]).rollout.unmasking
    assert same == load_config("tiny").rollout.unmasking


def test_overrides_of_a_choice_that_the_file_leaves_out(minimal):
    threshold = load_config(minimal, ["--rollout.unmasking.threshold", "0.8"])
    assert threshold.rollout.unmasking == DynamicUnmasking(threshold=0.8)
    mixed = load_config(minimal, ["--objective.divergence.alpha=0.1", "--objective.divergence.kind=mixed_kl"])
    assert mixed.objective.divergence == MixedKL(alpha=0.1)
    whole = load_config(minimal, ["--objective.divergence", "{kind: jensen_shannon, alpha: 0.2}"])
    assert whole.objective.divergence == JensenShannon(alpha=0.2)


def test_a_field_of_a_choice_goes_into_what_the_method_sets(minimal, tmp_path):
    method, decay = ["--objective.method", "drafter"], ["--objective.state.decay", "0.8"]
    responses = ["--data.responses", str(tmp_path)]
    for overrides in ([*method, *decay], [*decay, *method]):
        assert load_config(minimal, [*overrides, *responses]).objective.state == SuffixState(decay=0.8)
    in_yaml = load_config(minimal, ["--objective", "{method: drafter, state: {decay: 0.8}}", *responses])
    assert in_yaml.objective.state == SuffixState(decay=0.8)
    other = fails(minimal, *method, *responses, "--objective.state.kind", "random")
    assert "means state.kind suffix, but it is 'random'" in other
    assert "state.weighting" in fails(minimal, *method, *responses, "--objective.state.weighting", "1")
    plain = fails(minimal, "--objective", "{method: lift, weight: {a: 1}}", *responses)
    assert "objective.weight: {'a': 1}" in plain


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--learner.lrr=1", "learner.lrr: unknown field (value 1); did you mean learner.lr?"),
        ("--learner.min-lr=1", "did you mean learner.min_lr?"),
        ("--lr=1", "lr: unknown field (value 1); did you mean learner.lr?"),
        ("--curiculum.batches=1", "did you mean curriculum?"),
        ("--learner.zzz=1", "the fields here are batch_rows, betas,"),
        ("--rollout.unmasking.tresh=1", "unknown field (value 1); did you mean rollout.unmasking.threshold?"),
        ("--objective.divergence.alpha=0.1", "it belongs to another choice: mixed_kl or jensen_shannon"),
        ("--rollout.unmasking.rule=dynmic", "rollout.unmasking.rule: 'dynmic' is unknown, did you mean 'dynamic'?"),
        ("--rollout.unmasking={threshold: 0.5}", "rollout.unmasking.rule: missing; choose static, dynamic"),
        ("--teacher.backend=vlm", "teacher.backend: 'vlm' is unknown, did you mean 'vllm'?"),
        ("--rollout.actors=0", "rollout.actors: 0 is not accepted, it should be greater than or equal to 1"),
        ("--learner.lr=fast", "learner.lr: 'fast' is not accepted"),
        ("--rollout.unmasking.threshold=2", "rollout.unmasking.threshold: 2 is not accepted"),
        ("--learner=3", "learner: expected fields below it, found 3"),
        ("--learner.batch_rows=1", "raise batch_rows or lower ranks"),
        ("--block_size=5", "does not divide curriculum.min_tokens (8); set curriculum.min_tokens to 5 or 10"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named_with_its_value_and_a_remedy(override, said):
    assert said in fails("tiny", override)


def test_all_problems_are_said_at_once():
    message = fails("tiny", "--learner.lr", "-1", "--rollout.actors", "0")
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["learner.lr", "1"], "unexpected argument 'learner.lr'"),
        (["--learner.lr"], "option '--learner.lr' has no value"),
        (["--learner.lr", "--name", "x"], "option '--learner.lr' has no value"),
        (["--learner.betas", "[0.9"], "--learner.betas: '[0.9' is not valid YAML"),
    ],
)
def test_a_broken_command_line_is_explained(arguments, said):
    assert said in fails("tiny", *arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  path: x\n bad: [\n", "line 3: not valid YAML"),
        ("model:\n  path: x\n  path: y\n", "line 3: not valid YAML: key 'path' stands twice"),
        ("- a\n", "expected sections such as `model:` and `data:`, found a list"),
        ("", "expected sections such as `model:` and `data:`, found nothing"),
        ("\x00", "not valid YAML"),
        ("data: {prompts: p}\n", "model: missing; set model.path in the config or with --model.path VALUE"),
        ("model: {}\ndata: {prompts: p}\n", "model.path: missing; set model.path"),
        (MINIMAL + "evaluation: 5\n", "evaluation: expected fields below it, found 5"),
    ],
)
def test_a_broken_file_is_explained(tmp_path, text, said):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert said in fails(str(file))


def test_a_missing_file_lists_the_presets():
    message = fails("tinny")
    assert "no config 'tinny'; did you mean 'tiny'?" in message
    assert "qwen3-8b" in message


def test_shipped_paths_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("tiny")
    assert config.model.path == str(REPOSITORY / "deploy/models/tiny-arlm")
    assert config.evaluation.problems == str(REPOSITORY / "deploy/data/word_problems_heldout.jsonl")
    assert load_config("deploy/presets/tiny.yaml") == config


def test_a_resolved_config_loads_again(tmp_path):
    import yaml

    config = load_config("qwen3-4b", ["--rollout.unmasking.rule", "entropy_bound"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(str(file)) == config
    assert isinstance(config, RunConfig)


def test_an_ablation_is_not_a_run():
    assert "is an ablation, which is several runs; start it with: opdlm ablate ablation" in fails("ablation")
