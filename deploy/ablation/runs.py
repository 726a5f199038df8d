"""`opdlm ablate`: train every arm of an ablation with every seed, one run at a time or several, and write the report.

A finished run is never made again, and an interrupted one continues from its newest checkpoint: repeat the command
until it says that all runs are finished. If an arm was edited since its run, the run is refused: it is neither reported
nor continued.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.config.errors import ConfigError
from common.config.file import find_config, load_config, load_resolved, read_yaml, validated
from common.config.fingerprint import differences, input_paths
from common.config.renamed import old_names
from common.config.run import RunConfig
from common.config.yaml_loader import written
from deploy.ablation.config import AblationConfig, EvaluateConfig, RespondConfig
from deploy.ablation.processes import Processes
from deploy.ablation.suites import evaluate_final, is_evaluated
from deploy.errors import WorkerError
from deploy.files import replace_text
from deploy.held_out import share_held_out
from deploy.preflight import finished_summary
from deploy.stop_signals import StopRequested, StopSignals

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Arm:
    """One run of the ablation: an arm with a seed, how its offline responses are made, and what its final model is
    evaluated on, with or without the original beside it."""

    name: str
    seed: int
    config: RunConfig
    respond: RespondConfig = RespondConfig()
    evaluate: EvaluateConfig | None = None
    with_original: bool = False

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

    @property
    def evaluated(self) -> bool:
        """Whether its final model was evaluated on the suites; also where there are none."""
        return self.has_responses(scored=True)

    def has_responses(self, scored: bool) -> bool:
        """As `evaluated`; unless `scored`, responses are enough that are not scored yet."""
        config, folder = self.evaluate, self.config.run_dir
        return config is None or is_evaluated(folder, config, self.with_original, scored=scored)

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
    runs: list[Arm] = []
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
            with_original = ablation.evaluate is not None and ablation.evaluate.original and not runs
            config, respond = load_config(ablation.base, fields), own.respond or ablation.respond
            runs.append(Arm(name, seed, config, respond, ablation.evaluate, with_original))
    folders = [arm.config.run_dir for arm in runs]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"arms: two names give the same folder among {sorted(ablation.arms)}; rename one")
    return runs


def arms_named(ablation: AblationConfig, names: str) -> list[str]:
    """The arms that `names` lists, separated by commas, in the ablation's order; an arm whose own name has a comma is
    written as its folders are named.

    Raises:
        ConfigError: there is no such arm.
    """
    known = {alias: name for name in ablation.arms for alias in (name, _slug(name))}
    asked = [name.strip() for name in names.split(",")]
    if unknown := [name for name in asked if name not in known]:
        raise ConfigError(f"--arms: {unknown[0]!r} is no arm; choose from {', '.join(map(_slug, ablation.arms))}")
    return [name for name in ablation.arms if name in {known[each] for each in asked}]


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
    runs: list[Arm],
    note: Callable[[str], None],
    done: Callable[[Arm], None],
    jobs: int = 1,
    *,
    chosen: Sequence[Arm] | None = None,
    stop_after_s: float | None = None,
    keep_going: bool = False,
    evaluate: bool = True,
    score: bool = True,
) -> None:
    """Make what is missing of the `chosen` runs (default: of all), `jobs` at a time; `done` is called for each of them
    that ends well, and once more when its final model is evaluated on the suites, which follows unless `evaluate` is
    off; without `score` its responses are kept for a later call. Offline responses are made first, each file as one of
    the jobs; of a seed, the runs that wait for them come last.

    After `stop_after_s` seconds those in progress are stopped with a checkpoint, and no more are begun. A run that
    fails keeps others from beginning, unless `keep_going`; those in progress go on.

    Raises:
        WorkerError: a run ended with an error; names it and its log.
        Stopped: SIGTERM or SIGINT came; the runs in progress were stopped with a checkpoint.
    """
    chosen = runs if chosen is None else chosen
    trained = {arm.config.run_dir for arm in chosen if arm.done}
    missing = [
        arm for arm in chosen if arm.config.run_dir not in trained or (evaluate and not arm.has_responses(score))
    ]
    files = {arm.responses for arm in missing if arm.needs_responses and arm.config.run_dir not in trained}
    makers = [arm for arm in _first_of_each_file(runs) if arm.responses in files]
    made: dict[Path, Future[None]] = {arm.responses: Future() for arm in makers if not arm.responses.exists()}
    processes = Processes()

    def respond(arm: Arm) -> None:
        try:
            _respond(arm, note, processes)
        except BaseException as error:
            made[arm.responses].set_exception(error)
            raise
        made[arm.responses].set_result(None)

    def waits(arm: Arm) -> bool:
        return arm.needs_responses and arm.responses in made and arm.config.run_dir not in trained

    def make(arm: Arm) -> None:
        if waits(arm):  # all of these calls began before this one
            made[arm.responses].result()
        if arm.config.run_dir not in trained:
            note(f"{arm.name}, seed {arm.seed}")
            _train(arm, runs, processes)
            done(arm)
        if arm.evaluate and evaluate and not arm.has_responses(score):
            note(f"{arm.name}, seed {arm.seed}: {', '.join(arm.evaluate.names)}")
            evaluate_final(arm.config, arm.evaluate, arm.with_original, processes, score=score)
            done(arm)

    calls = [partial(respond, arm) for arm in makers if arm.responses in made]
    seeds = list(dict.fromkeys(arm.seed for arm in runs))
    calls += [partial(make, arm) for arm in sorted(missing, key=lambda arm: (seeds.index(arm.seed), waits(arm)))]
    with StopSignals() as stop:
        deadline = None if stop_after_s is None else time.monotonic() + stop_after_s

        def is_over() -> bool:
            return stop.requested or (deadline is not None and time.monotonic() >= deadline)

        _in_turn(calls, jobs, processes, is_over, keep_going)
        if stop.requested:
            raise stop.error(f"{how_far(chosen)}; to go on, repeat the command")


def how_far(runs: Sequence[Arm]) -> str:
    """How many runs are finished and, where there are suites, evaluated."""
    said = f"{sum(arm.done for arm in runs)} of {len(runs)} runs are finished"
    if any(arm.evaluate for arm in runs):
        said += f", {sum(arm.evaluated for arm in runs)} evaluated"
    return said


def _in_turn(
    calls: Sequence[Callable[[], None]],
    jobs: int,
    processes: Processes,
    is_over: Callable[[], bool],
    keep_going: bool,
) -> None:
    """Make the calls, `jobs` at a time, until it is over; then the processes are stopped.

    Raises:
        WorkerError: that of the first call that failed, once no other is in progress.
    """
    errors: list[BaseException] = []
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(call) for call in calls}
        try:
            while waiting:
                if is_over():
                    processes.stop()
                if processes.stopping or (errors and not keep_going):
                    waiting = {future for future in waiting if not future.cancel()}
                ended, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for error in filter(None, (future.exception() for future in ended)):
                    if not isinstance(error, StopRequested) and error not in errors:  # of responses: that of many runs
                        errors.append(error)
        except KeyboardInterrupt:  # the second Ctrl-C
            processes.stop()
            raise
    if errors:
        raise errors[0] if len(errors) == 1 else WorkerError(f"{errors[0]}; {len(errors) - 1} more failed")


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


def _respond(arm: Arm, note: Callable[[str], None], processes: Processes) -> None:
    file, record = arm.responses, _responses_record(arm)
    note(f"the teacher's responses, {file.name}")
    base = _write_config(arm.config, record.parent)
    replace_text(record, json.dumps(_responses_made_with(arm), indent=2) + "\n")
    options = [part for name, value in arm.respond for part in (f"--{name.replace('_', '-')}", str(value))]
    processes.run(["respond", str(base), "--output", str(file), *options], record.parent / "output.log")


def _train(arm: Arm, runs: list[Arm], processes: Processes) -> None:
    """Train and evaluate; the checkpoints that the run could go on from are removed in the end."""
    folder = arm.config.run_dir
    config = _write_config(arm.config, folder.with_name(f"{folder.name}.config"))
    if alike := [other.config.run_dir for other in runs if _holds_out_alike(arm.config, other.config)]:
        share_held_out(alike, folder)
    processes.run(["train", str(config), "--resume", "auto"], config.parent / "output.log")
    for checkpoint in (folder / "checkpoints").glob("batch-*"):
        shutil.rmtree(checkpoint)


def _holds_out_alike(config: RunConfig, other: RunConfig) -> bool:
    """Whether two runs hold out the same prompts and have the same original answer them."""
    read = [
        (c.seed, c.model, c.teacher_paths, c.evaluation.held_out_prompts, c.evaluation.held_out_tokens,
         c.data.model_dump(exclude={"responses"}))
        for c in (config, other)
    ]  # fmt: skip
    return config.evaluation.held_out_prompts > 0 and read[0] == read[1]


def _write_config(config: RunConfig, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(written(config.model_dump(mode="json")))
    return path


def _slug(name: str) -> str:
    return "-".join("".join(c if (c.isascii() and c.isalnum()) or c == "_" else " " for c in name).split()) or "arm"
