"""Weights & Biases, offline: the run's metrics are in its files, under the registry's names and one id."""

import pytest

from common.config.errors import ConfigError
from common.config.file import load_config
from deploy import preflight
from deploy.monitoring.metrics import METRICS
from deploy.monitoring.wandb_log import WandbLog, _beginning

wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install opdlm[wandb]")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")


def config(tmp_path, *overrides: str):
    return load_config("tiny", ["--output_dir", str(tmp_path), "--wandb.mode", "offline", *overrides])


def metrics(batch: int) -> dict[str, float | None]:
    return {name: batch + i / 64 for i, name in enumerate(METRICS) if name != "time"} | {"batch": batch, "kl": None}


def test_metrics_are_in_the_runs_folder(tmp_path):
    settings = config(tmp_path, "--wandb.enabled", "true", "--wandb.project", "mine")
    settings.run_dir.mkdir()
    ids = set()
    for start in (0, 3):  # a run, and its continuation
        with WandbLog(settings, start) as log:
            ids.add(wandb.run.id)
            assert wandb.run.project == "mine" and wandb.run.config["learner"]["lr"] == settings.learner.lr
            for batch in range(start, start + 3):
                log.batch(metrics(batch))
            assert wandb.run.summary["batch"] == start + 2
            assert wandb.run.summary["seconds/publish"] == metrics(start + 2)["seconds/publish"]
            assert "kl" not in wandb.run.summary.keys()  # noqa: SIM118 - not a dict
    assert len(ids) == 1
    files = sorted((settings.run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert files and all(b"rollout/tokens_per_second" in file.read_bytes() for file in files)


def test_nothing_happens_unless_asked_for(tmp_path):
    settings = config(tmp_path)
    with WandbLog(settings) as log:
        log.batch(metrics(0))
    assert not settings.run_dir.exists() and wandb.run is None


def test_missing_client_is_refused_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb\.enabled: 'wandb' is not installed; install opdlm\[wandb\]"):
        preflight.prepare(config(tmp_path, "--wandb.enabled", "true"))


def test_a_run_that_goes_on_is_taken_back_to_its_checkpoint(tmp_path):
    """What the server does with it cannot be seen here; that the client accepts it can."""
    new = _beginning(tmp_path, 0, "online")
    assert _beginning(tmp_path, 3, "online") == {"resume_from": f"{new['id']}?_step=2"}
    assert _beginning(tmp_path, 3, "offline") == {"id": new["id"], "resume": "allow"}
    moment = wandb.Settings(resume_from=_beginning(tmp_path, 3, "online")["resume_from"]).resume_from
    assert (moment.run, moment.metric, moment.value) == (new["id"], "_step", 2)
    assert _beginning(tmp_path, 0, "online") != new, "one that begins anew gets an id of its own"
