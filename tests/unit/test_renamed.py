"""Old names in a config are refused with the new ones said, and runs of an earlier release go on."""

import pytest
import yaml

from common.config.errors import ConfigError
from common.config.fields import leaves
from common.config.file import load_config
from common.config.renamed import FIELDS, VALUES
from deploy.checkpoints import check_same_run

OF_A_RUN = {old: new for old, new in FIELDS.items() if not old.startswith("claims.")}
PLACES = [(path, old, new) for path, values in VALUES.items() for old, new in values.items()]


def refused(source: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(source, list(overrides))
    return str(error.value)


def file_with(tmp_path, path: str, value: object) -> str:
    config = load_config("tiny").model_dump(mode="json")
    *sections, name = path.split(".")
    section = config
    for part in sections:
        section = section[part]
    section[name] = value
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)


@pytest.mark.parametrize(("old", "new"), OF_A_RUN.items())
def test_an_old_field_is_refused_with_the_new_one_said(tmp_path, old, new):
    said = f"{old} is now {new}; write that"
    assert refused("tiny", f"--{old}", "true") == said
    assert refused(file_with(tmp_path, old, True)) == said
    paths = [path for path, _, _ in leaves()]
    assert old not in paths
    assert any(path == new or path.startswith(f"{new}.") for path in paths)


@pytest.mark.parametrize(("path", "old", "new"), PLACES)
def test_an_old_value_is_refused_with_the_new_one_said(tmp_path, path, old, new):
    said = f"{path} {old!r} is now {new!r}; write that"
    assert refused("tiny", f"--{path}", old) == said
    assert refused(file_with(tmp_path, path, old)) == said


def test_all_old_names_are_said_at_once():
    message = refused("tiny", "--objective.trust_weight", "true", "--objective.source", "{kind: stored}")
    assert sorted(message.splitlines()) == [
        "objective.source.kind 'stored' is now 'offline'; write that",
        "objective.trust_weight is now objective.importance_weight; write that",
    ]


@pytest.mark.parametrize(
    ("source", "old"),
    [
        ({"kind": "offline"}, {"kind": "stored"}),
        ({"kind": "mixture", "start": 0.5}, {"kind": "mixture", "start": 0.5}),
    ],
)
def test_a_run_of_an_earlier_release_is_the_same_run(tmp_path, source, old):
    overrides = ["--output_dir", str(tmp_path), "--data.responses", "answers.jsonl", "--objective.state.kind", "random"]
    config = load_config("tiny", [*overrides, "--objective.source", str(source)])
    resolved = config.model_dump(mode="json")
    objective = resolved["objective"]
    objective["trust_weight"] = objective.pop("importance_weight")
    state = objective["source"].pop("offline_state", None)
    objective["source"] |= old | ({"stored_state": state} if state else {})
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(resolved))
    check_same_run(config)
    objective["trust_weight"] = True
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(resolved))
    with pytest.raises(ConfigError, match=r"objective\.importance_weight was True and is False"):
        check_same_run(config)
