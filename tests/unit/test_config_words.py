"""A word of YAML or of the command line means what the type of its field says; paths are filled in."""

import getpass
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config.errors import ConfigError
from common.config.file import REPOSITORY, load_config
from common.config.paths import expanded
from common.config.run import RunConfig
from common.config.yaml_loader import written
from deploy.ablation.config import AblationConfig
from deploy.ablation.runs import arms_of, load_ablation

MINIMAL = "model: {path: deploy/models/tiny-arlm}\ndata: {prompts: questions.jsonl}\n"
# all of them text in YAML's grammar or a number, a date, a boolean, null, a comment, an alias, a tag or an error
WORDS = [
    "1.10", "007", "5e12345", "no", "on", "a #b", "x: y", "*", "&", "!", "!x", "@x", "%x", "`", "null", "Null", "~x",
    "true", "1_000", "0x10", "0o7", "2020-01-01", "12:30:45", ".inf", ".nan", "-0", "+1", "1.", "{a", "[", "]", "- a",
    "? a", "'", '"', '"quoted"', "ünï 名", " leading", "trailing ", "{{ x }}", "a\nb", "\\n", "<<", "=", "#", "-", "|",
]  # fmt: skip


def config(tmp_path: Path, text: str = "", *overrides: str) -> RunConfig:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL + text, encoding="utf-8")
    return load_config(str(file), list(overrides))


@pytest.mark.parametrize("word", WORDS)
def test_text_is_text_as_typed(tmp_path, word):
    typed = config(tmp_path, "", f"--wandb.project={word}", "--model.mask_token", word)
    assert (typed.wandb.project, typed.model.mask_token) == (word, word)
    quoted = config(tmp_path, yaml.safe_dump({"wandb": {"project": word}}))
    assert quoted.wandb.project == word


@pytest.mark.parametrize(
    "word", ["1.10", "007", "5e12345", "no", "null", "true", "1_000", "0x10", "2020-01-01", ".inf"]
)
def test_a_plain_word_of_a_file_is_text_where_text_is_due(tmp_path, word):
    made = config(tmp_path, f"wandb: {{project: {word}}}\n")
    assert made.wandb.project == word
    if word != ".inf":  # no label of Ray
        labels = config(tmp_path, f"rollout: {{resources: {{labels: {{{word}: {word}}}}}}}\n").rollout.resources.labels
        assert labels == {word: word}


def test_labels_of_ray_take_dots_and_slashes(tmp_path):
    labels = config(tmp_path, "", "--rollout.resources.labels.ray.io/zone", "1.10").rollout.resources.labels
    assert labels == {"ray.io/zone": "1.10"}
    two = config(tmp_path, "", "--rollout.resources.labels.role=a", "--rollout.resources.labels.kind=b")
    assert two.rollout.resources.labels == {"role": "a", "kind": "b"}  # `kind` chooses nothing here
    caps = config(tmp_path, "", "--data.domain_max_tokens", "{1.10: 5}", "--data.domain_max_tokens.a.b", "7")
    assert caps.data.domain_max_tokens == {"1.10": 5, "a.b": 7}


@pytest.mark.parametrize("word", ["null", "Null", "NULL", "~", ""])
def test_null_unsets_what_may_be_unset(tmp_path, word):
    assert config(tmp_path, "", f"--teacher.path={word}").teacher.path is None
    assert config(tmp_path, f"teacher: {{path: {word}}}").teacher.path is None
    assert config(tmp_path, f"wandb: {{group: {word}}}\n", f"--pipeline.max_batches={word}").wandb.group is None
    assert config(tmp_path, "wandb: {group: 'null'}").wandb.group == "null"


@pytest.mark.parametrize("name", ["1.10", "007", "5e12345", "1_000", "no", "null", "2020-01-01"])
def test_a_run_keeps_its_name(tmp_path, name):
    assert config(tmp_path, "", "--name", name).run_dir == Path("runs", name)
    assert config(tmp_path, f"name: {name}\n").run_dir == Path("runs", name)


def test_arms_of_an_ablation_keep_their_words(tmp_path):
    file = tmp_path / "ablation.yaml"
    file.write_text("name: 1.10\nbase: tiny\narms: {007: {wandb.project: 1.10, learner.lr: 1e-4}, no: {seed: 7}}\n")
    ablation = load_ablation(str(file))
    assert ablation.name == "1.10" and list(ablation.arms) == ["007", "no"]
    first, second = arms_of(ablation)[:2]
    assert (first.config.wandb.project, first.config.learner.lr) == ("1.10", 1e-4)
    assert first.config.run_dir == Path("runs/1.10/007-seed0") and second.config.seed == 7


def test_arms_do_not_share_what_they_change(tmp_path):
    changes: dict[str, Any] = {"curriculum": {"min_tokens": 16, "max_tokens": 64}}
    arms: dict[str, Any] = {"a": {"curriculum.max_tokens": 32}, "b": {}}
    ablation = AblationConfig(name="x", base="tiny", seeds=(0,), overrides=changes, arms=arms)
    assert [arm.config.curriculum.max_tokens for arm in arms_of(ablation)] == [32, 64]


def test_aliases_are_copies(tmp_path):
    text = "rollout: {resources: &r {cpus: 1}}\nteacher: {resources: *r}\nlearner: {resources: {<<: *r, threads: 3}}\n"
    made = config(tmp_path, text, "--rollout.resources.cpus", "2")
    assert (made.rollout.resources.cpus, made.teacher.resources.cpus) == (2, 1)
    assert (made.learner.resources.cpus, made.learner.resources.threads) == (1, 3)


PATHS = [
    "/x #2",
    "a: b",
    "ü/名",
    "a b",
    "*",
    "&x",
    "1.10",
    "007",
    "[x]",
    "{a}",
    "$",
    "$5",
    "a$",
    "x~",
    "-",
    "%20",
    "'q'",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_may_hold_anything(tmp_path, path):
    made = config(tmp_path, "", "--output_dir", path, f"--data.prompts={path}", "--dashboard.token_file", path)
    assert made.output_dir == Path(path)
    assert (made.data.prompts, made.dashboard.token_file) == (path, path)


FIELDS = [
    "output_dir", "model.path", "teacher.path", "data.prompts", "data.responses", "data.trajectories",
    "evaluation.problems", "dashboard.token_file", "pipeline.copy_checkpoints_to",
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_home_and_variables_are_filled_in_everywhere(tmp_path, monkeypatch, field):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", "/data")
    for typed, meant in (
        ("~", f"{tmp_path}/home"), ("~/a b", f"{tmp_path}/home/a b"), ("$DATA/x", "/data/x"), ("${DATA}x", "/datax"),
        ("$HOME/$DATA", f"{tmp_path}/home//data"), ("./~", "./~"), ("a/~", "a/~"),
    ):  # fmt: skip
        if typed == "~" and field not in ("output_dir", "model.path", "data.prompts"):
            continue  # null, which these may be
        section, _, name = field.rpartition(".")
        for made in (
            config(tmp_path, "", f"--{field}", typed),
            config(tmp_path, "", f"--{section or 'output_dir'}", f"{{{name}: '{typed}'}}")
            if section not in ("", "model", "data")
            else config(tmp_path, "", f"--{field}={typed}"),
        ):
            value: Any = made
            for part in field.split("."):
                value = getattr(value, part)
            assert str(value) == str(Path(meant)) if field == "output_dir" else value == meant


def test_a_url_is_no_path(tmp_path):
    url = "s3://bucket/~/$x"
    assert config(tmp_path, "", "--pipeline.copy_checkpoints_to", url).pipeline.copy_checkpoints_to == url


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("$NO_SUCH/x", "output_dir: '$NO_SUCH/x': the environment variable NO_SUCH is not set"),
        ("~no-such-user/x", "no home of '~no-such-user' is known"),
        ("", "output_dir: '' is no path"),
        ("  ", "is no path"),
        ("a\nb", "'a\\nb' holds a line break"),
        ("a\x00b", "holds a line break or another control character"),
        ("x" * 5000, "is too long for a path"),
        ("/".join(["abc"] * 2000), "is too long for a path"),
        ("ü" * 128, "is too long for a path"),
        ("{{ OUT }}", "'{{ OUT }}' is a placeholder of a template that was not filled in"),
        ("a\ud800", "is not valid UTF-8"),
    ],
)
def test_a_path_that_cannot_be_meant_is_refused(tmp_path, path, said):
    with pytest.raises(ConfigError) as error:
        config(tmp_path, "", f"--output_dir={path}")
    assert said in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("path", ["~/x", "~", "$HOME/x", "${HOME}/x"])
def test_an_empty_home_is_not_the_root(tmp_path, monkeypatch, path):
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ConfigError, match=r"^output_dir: .*(no home of '~' is known|HOME is not set)"):
        config(tmp_path, "", f"--output_dir={path}")


def test_what_exists_under_a_strange_name_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("$NO_SUCH", "~nobody-here", "{{ x }}"):
        (tmp_path / name).mkdir()
        assert expanded(name) == name
    assert expanded(f"~{getpass.getuser()}/x").endswith("/x")


def test_shipped_files_are_found_and_own_ones_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = "deploy/data/word_problems_train.jsonl"
    assert config(tmp_path, "", "--data.prompts", shipped).data.prompts == str(REPOSITORY / shipped)
    (tmp_path / "deploy/data").mkdir(parents=True)
    (tmp_path / shipped).write_text("{}")
    assert config(tmp_path, "", "--data.prompts", shipped).data.prompts == shipped


def test_a_config_is_found_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(MINIMAL)
    assert load_config("~/run.yaml").data.prompts == "questions.jsonl"
    (tmp_path / "ablation.yaml").write_text("{name: x, base: ~/run.yaml, seeds: [0], arms: {a: {}}, output_dir: ~/o}")
    (arm,) = arms_of(load_ablation("~/ablation.yaml"))
    assert arm.config.run_dir == tmp_path / "o/x/a-seed0"


@pytest.mark.parametrize("word", WORDS)
def test_the_config_that_a_run_writes_is_read_again_as_it_was(tmp_path, word):
    keys = {"zero_optimization": {"offload_param": {"nvme_path": word}}, "wall_clock_breakdown": True}
    made = config(
        tmp_path, yaml.safe_dump({"wandb": {"project": word}, "learner": {"deepspeed": keys}}, default_style="'")
    )
    file = tmp_path / "config.yaml"
    file.write_text(written(made.model_dump(mode="json")), encoding="ascii")
    assert load_config(str(file)) == made
    assert yaml.safe_load(file.read_text())["wandb"]["project"] == word  # and by readers of YAML 1.1


@pytest.mark.parametrize("number", ["1e-5", "1.0e-5", "0.1", "7", "1e22", "-3", "true", "null"])
def test_a_number_of_deepspeeds_stays_one(tmp_path, number):
    made = config(tmp_path, "", "--learner.deepspeed.some_key", number)
    file = tmp_path / "config.yaml"
    file.write_text(written(made.model_dump(mode="json")), encoding="ascii")
    again = load_config(str(file)).learner.deepspeed["some_key"]
    assert again == made.learner.deepspeed["some_key"] and not isinstance(again, str)
