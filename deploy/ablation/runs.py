"""`opdlm ablate`: train every arm of an ablation with every seed, one run at a time or several, and write the report.

A finished run is never made again, and an interrupted one continues from its newest checkpoint: repeat the command
until it says that all runs are finished. If an arm was edited since its run, the run is refused: it is neither reported
nor continued.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.errors import ConfigError
from common.config.file import find_config, load_config, load_resolved, read_yaml, validated
from common.config.fingerprint import differences, input_paths
from common.config.renamed import old_names
from common.config.run import RunConfig
from common.config.yaml_loader import written
from deploy.ablation.config import AblationConfig, RespondConfig
from deploy.child_environment import child_environment
from deploy.errors import WorkerError
from deploy.files import replace_text
from deploy.preflight import finished_summary


@dataclass(frozen=True)
class Arm:
    """One run of the ablation: an arm with a seed, and how its offline responses are made."""

    name: str
    seed: int
    config: RunConfig
    respond: RespondConfig = RespondConfig()

    @property
    def needs_responses(self) -> bool:
        return self.config.objective.needs_responses

    @property
    def responses(self) -> Path:
        """The file of its offline responses."""
        assert self.config.data.responses
        return Path(self.config.data.responses)

    @property
    def done(self) -> bool:
        """Whether the run of this very config is finished."""
        return bool(finished_summary(self.config))

    def differences(self) -> list[str]:
        """Fields in which the run in the arm's folder differs, with both values; empty if there is no run yet."""
        file = self.config.run_dir / "config.yaml"
        if not file.is_file():
            return []
        before, now = load_resolved(file), self.config
        old = input_paths(before) | {f"evaluation.{name}": value for name, value in before.evaluation}
        new = input_paths(now) | {f"evaluation.{name}": value for name, value in now.evaluation}
        changed = sorted(name for name in new if old.get(name) != new[name])
        others = (f"{name} was {old.get(name)!r} and is {new[name]!r}" for name in changed)
        return list(dict.fromkeys([*differences(before, now), *others]))


def load_ablation(source: str) -> AblationConfig:
    """The validated ablation of a YAML file or of a file in the presets' folder.

    Raises:
        ConfigError: the file is missing, or a field is unknown, was renamed or has a bad value.
    """
    raw = read_yaml(find_config(source, "ABLATION", "an ablation, such as deploy/presets/ablation.yaml"))
    if "arms" not in raw and "model" in raw:
        raise ConfigError(f"{source!r} is a run, not an ablation; start it with: opdlm train {source}")
    if renamed := old_names(raw):
        raise ConfigError("\n".join(renamed))
    return validated(AblationConfig, raw)


def arms_of(ablation: AblationConfig) -> list[Arm]:
    """All runs in the order in which they are made; every config is validated before the first one starts."""
    runs = []
    for seed in ablation.seeds:
        for name, own in ablation.arms.items():
            if own.seeds and seed not in own.seeds:
                continue
            fields: dict[str, Any] = {
                "name": f"{_slug(name)}-seed{seed}",
                "output_dir": str(ablation.output_dir / ablation.name),
                "seed": seed,
                "data.responses": str(_responses_file(ablation, name)),
                **ablation.overrides,
                **own.fields,
            }
            runs.append(Arm(name, seed, load_config(ablation.base, fields), own.respond or ablation.respond))
    folders = [arm.config.run_dir for arm in runs]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"arms: two names give the same folder among {sorted(ablation.arms)}; rename one")
    return runs


def _responses_file(ablation: AblationConfig, arm: str) -> Path:
    """The offline responses of an arm: those of all arms, or its own."""
    own = f"responses-{_slug(arm)}" if ablation.arms[arm].respond else "responses"
    return ablation.output_dir / ablation.name / f"{own}.parquet"


def check_runs(ablation: AblationConfig, runs: list[Arm]) -> None:
    """Refuse runs and responses in the ablation's folder that were made with another config.

    Raises:
        ConfigError: names the arm and the fields, or the fields of `respond`, and the remedy.
    """
    different = [(arm, fields) for arm in runs if (fields := arm.differences())]
    if different:
        arm, fields = different[0]
        raise ConfigError(
            f"arms: {arm.name!r} with seed {arm.seed} was run with another config: {'; '.join(fields)}. Remove "
            f"{str(arm.config.run_dir)!r}, or rename the arm"
            + (f"; the same holds for {len(different) - 1} more" if len(different) > 1 else "")
        )
    for arm in _first_of_each_file(runs):
        _check_responses(arm, runs)


def _check_responses(arm: Arm, runs: list[Arm]) -> None:
    """Refuse a file of responses that was made with another config than an arm's, whose it is."""
    record, file = _responses_record(arm), arm.responses
    if not (file.is_file() and record.is_file()):
        return
    old, new = _respond_fields(RespondConfig()) | json.loads(record.read_text()), _responses_made_with(arm)
    changed = [f"{field} was {old.get(field)!r} and is {new[field]!r}" for field in new if old.get(field) != new[field]]
    if changed:
        trained = [
            str(other.config.run_dir)
            for other in runs
            if other.needs_responses and other.responses == file and other.config.run_dir.is_dir()
        ]
        raise ConfigError(
            f"respond: {str(file)!r} was made with another config: {'; '.join(changed)}. Remove it"
            + (f", and with it what was trained on it: {', '.join(trained)}" if trained else "")
        )


def _first_of_each_file(runs: list[Arm]) -> list[Arm]:
    """For each file of responses the first of the runs that need it."""
    return list({arm.responses: arm for arm in reversed(runs) if arm.needs_responses}.values())[::-1]


def run_all(
    ablation: AblationConfig, runs: list[Arm], note: Callable[[str], None], done: Callable[[], None], jobs: int = 1
) -> None:
    """Make what is missing, `jobs` runs at a time; `done` is called after every run, also for those found finished.

    Raises:
        WorkerError: a run ended with an error; names it and its log. Runs in progress are waited for, others cancelled.
    """
    for arm in _first_of_each_file([arm for arm in runs if not arm.done]):
        _respond(arm, note)
    missing = [arm for arm in runs if not arm.done]
    for _ in range(len(runs) - len(missing)):
        done()

    def train(arm: Arm) -> None:
        note(f"{arm.name}, seed {arm.seed}")
        _train(arm)

    pool = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([pool.submit(train, arm) for arm in missing]):
            future.result()
            done()
    finally:
        pool.shutdown(cancel_futures=True)


def _responses_record(arm: Arm) -> Path:
    return arm.responses.with_suffix("") / "made_with.json"


def _responses_made_with(arm: Arm) -> dict[str, Any]:
    """What the teacher's responses depend on, by field."""
    config = arm.config
    best = {"model.path": config.model.path, "evaluation.answer_format": config.evaluation.answer_format}
    return {
        **_respond_fields(arm.respond),
        **(best if arm.respond.keep == "best" else {}),
        "curriculum.max_tokens": config.curriculum.max_tokens,
        **config.teacher_paths,
        "seed": config.seed,
        **{f"data.{name}": value for name, value in config.data.model_dump(mode="json", exclude={"responses"}).items()},
    }


def _respond_fields(respond: RespondConfig) -> dict[str, Any]:
    return {f"respond.{name}": value for name, value in respond}


def _respond(arm: Arm, note: Callable[[str], None]) -> None:
    file, record = arm.responses, _responses_record(arm)
    if file.exists():
        return
    note(f"the teacher's responses, {file.name}")
    base = _write_config(arm.config, record.parent)
    replace_text(record, json.dumps(_responses_made_with(arm), indent=2) + "\n")
    options = [part for name, value in arm.respond for part in (f"--{name.replace('_', '-')}", str(value))]
    _command(["respond", str(base), "--output", str(file), *options], record.parent / "output.log")


def _train(arm: Arm) -> None:
    folder = arm.config.run_dir
    config = _write_config(arm.config, folder.with_name(f"{folder.name}.config"))
    _command(["train", str(config), "--resume", "auto"], config.parent / "output.log")


def _write_config(config: RunConfig, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(written(config.model_dump(mode="json")))
    return path


def _command(arguments: list[str], log: Path) -> None:
    """Run this program again: each run has its own process tree, so that nothing of one is left in the next."""
    with log.open("a") as output:
        output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(arguments)}\n")
        output.flush()
        command = [sys.executable, "-m", "deploy", *arguments]
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=child_environment()).returncode
    if status:
        raise WorkerError(f"`opdlm {' '.join(arguments)}` ended with status {status}; its output is in {log}")


def _slug(name: str) -> str:
    return "-".join("".join(c if (c.isascii() and c.isalnum()) or c == "_" else " " for c in name).split()) or "arm"
