"""`make real`: which steps there are, which are skipped, and that their commands and its Makefile variables exist."""

import re
import subprocess

import pytest
from typer.main import get_command

from common.config.errors import ConfigError
from common.config.file import REPOSITORY, load_config
from deploy.cli import app
from deploy.demo import real_model


@pytest.fixture
def commands(monkeypatch):
    """The commands that would run, which run nothing."""
    seen: list[list[str]] = []

    def keep(command, check):
        seen.append(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(real_model.subprocess, "run", keep)
    return seen


def test_every_command_is_one_of_opdlm_with_options_that_it_has(commands, tmp_path):
    for small in (False, True):
        real_model.run(real_model.steps(tmp_path / "real", "some/model", 20, None, small))
    assert [c[0] for c in commands] == ["prompts", "train", "eval", "prompts", "train"]
    known = get_command(app).commands
    for name, *arguments in commands:
        options = [a for a in arguments if a.startswith("--")]
        own = {o for parameter in known[name].params for o in parameter.opts}
        fields = [o for o in options if o not in own]
        assert all("." in o or o == "--output_dir" for o in fields), fields
    for _, preset, *overrides in (c for c in commands if c[0] == "train"):
        without = overrides[: overrides.index("--resume")]
        config = load_config(preset, without)
        assert (config.model.path, config.output_dir) == ("some/model", tmp_path / "real")
    assert config.pipeline.max_batches == 2  # the small one, on two cores
    cpus = [config.rollout.resources, config.teacher.resources, config.learner.resources]
    assert (sum(r.cpus for r in cpus), sum(r.gpus for r in cpus)) == (2, 0)


def test_steps_whose_result_is_there_are_skipped(commands, tmp_path):
    folder = tmp_path / "real"
    for made in ("model", "smollm2-135m/checkpoints/final"):
        (folder / made).mkdir(parents=True)
    (folder / "prompts.parquet").touch()
    real_model.run(real_model.steps(folder, None, 20, tmp_path / "data", small=False))
    assert [c[0] for c in commands] == ["eval"]
    assert commands[0][commands[0].index("--problems") + 1] == str(tmp_path / "data" / "gsm8k_test.jsonl")


def test_a_command_that_fails_ends_it_with_its_status(monkeypatch, tmp_path):
    monkeypatch.setattr(
        real_model.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, returncode=2)
    )
    with pytest.raises(SystemExit) as ended:
        real_model.run(real_model.steps(tmp_path, "some/model", 20, None, small=False))
    assert ended.value.code == 2


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(real_model, "PACKAGE", "no_such_model")
    with pytest.raises(ConfigError, match=r"no-such-model is not installed; .*make real MODEL=FOLDER"):
        real_model.packaged_gguf()


def test_the_makefile_knows_what_the_page_says():
    makefile = (REPOSITORY / "Makefile").read_text()
    page = (REPOSITORY / "docs" / "real-model.md").read_text()
    assert re.search(r"^real:", makefile, flags=re.MULTILINE)
    for variable in set(re.findall(r"\b(MODEL|PROMPTS|DATA|REAL|REAL_EXTRA)=", page)):
        assert re.search(rf"^{variable} \?=", makefile, flags=re.MULTILINE)
    assert real_model.PACKAGE.replace("_", "-") in makefile
