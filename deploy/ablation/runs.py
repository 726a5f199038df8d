"""`opdlm ablate`: train every arm of an ablation with every seed, one run at a time or several, and write the report.

A finished run is never made again, and an interrupted one goes on from its newest checkpoint: repeat the command until
it says that it is done.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.config.errors import ConfigError
from common.config.file import find_config, load_config, read_yaml, validated
from common.config.renamed import old_names
from common.config.run import RunConfig
from deploy.ablation.config import AblationConfig
from deploy.child_environment import child_environment
from deploy.errors import WorkerError


@dataclass(frozen=True)
class Arm:
    """One run of the ablation: an arm with a seed."""

    name: str
    seed: int
    config: RunConfig

    @property
    def done(self) -> bool:
        return (self.config.run_dir / "summary.json").exists()


def load_ablation(source: str) -> AblationConfig:
    """The validated ablation of a YAML file or of a file in the presets' folder.

    Raises:
        ConfigError: the file is missing, or a field is unknown, was renamed or has a bad value.
    """
    raw = read_yaml(find_config(source, "ABLATION", "an ablation, such as deploy/presets/ablation.yaml"))
    if renamed := old_names(raw):
        raise ConfigError("\n".join(renamed))
    return validated(AblationConfig, raw)


def arms_of(ablation: AblationConfig) -> list[Arm]:
    """All runs in the order in which they are made; every config is validated before the first one starts."""
    runs = []
    for seed in ablation.seeds:
        for name, own in ablation.arms.items():
            fields: dict[str, Any] = {
                "name": f"{_slug(name)}-seed{seed}",
                "output_dir": str(ablation.output_dir / ablation.name),
                "seed": seed,
                "data.responses": str(responses_file(ablation)),
                **ablation.overrides,
                **own,
            }
            runs.append(Arm(name, seed, load_config(ablation.base, fields)))
    folders = [arm.config.run_dir for arm in runs]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"arms: two names give the same folder among {sorted(ablation.arms)}; rename one")
    return runs


def responses_file(ablation: AblationConfig) -> Path:
    return ablation.output_dir / ablation.name / "responses.parquet"


def run_all(
    ablation: AblationConfig, runs: list[Arm], note: Callable[[str], None], done: Callable[[], None], jobs: int = 1
) -> None:
    """Make what is missing, `jobs` runs at a time; `done` is called after every run, also for those found finished.

    Raises:
        WorkerError: a run ended with an error; names it and its log. Runs under way are waited for, others cancelled.
    """
    if any(arm.config.objective.source.kind != "student" and not arm.done for arm in runs):
        _respond(ablation, runs[0].config, note)
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


def _respond(ablation: AblationConfig, config: RunConfig, note: Callable[[str], None]) -> None:
    file = responses_file(ablation)
    if file.exists():
        return
    note("the teacher's responses")
    base = _write_config(config, file.parent / "responses")
    options = ["--temperature", str(ablation.respond.temperature), "--samples", str(ablation.respond.samples)]
    _command(["respond", str(base), "--output", str(file), *options], file.parent / "responses" / "output.log")


def _train(arm: Arm) -> None:
    folder = arm.config.run_dir
    config = _write_config(arm.config, folder.with_name(f"{folder.name}.config"))
    _command(["train", str(config), "--resume", "auto"], config.parent / "output.log")


def _write_config(config: RunConfig, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
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
