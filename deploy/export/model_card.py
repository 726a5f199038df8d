"""The model card of an exported folder, README.md: written from the run, as far as its folder says something.

It names no path of this machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from pprint import pformat
from typing import Any

import yaml
from huggingface_hub import ModelCard

from common.config.errors import ConfigError
from common.config.run import RunConfig
from deploy.evaluation.results import FORMAT_VERSION
from deploy.export.exported_folder import Format, Student
from deploy.export.run_record import RunRecord, public_name

CARD = "README.md"
# what of the run's config makes the model; paths and machines do not
_SETTINGS: Any = {  # as pydantic's model_dump takes it
    "block_size": True,
    "seed": True,
    "attention": True,
    "adapter": True,
    "objective": True,
    "curriculum": True,
    "block_growth": True,
    "rollout": {"unmasking", "temperature"},
    "learner": {"lr", "updates_per_batch", "max_grad_norm"},
}
_LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
asked = {asked}
made = model.generate(**asked, max_new_tokens=128, rule="dynamic", threshold=0.9)
print(tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
```

It needs torch and transformers 5. `opdlm serve {name}` serves it on OpenAI's API."""
_PEFT = """An adapter of {base}. It needs peft, torch and transformers 5, and `block_diffusion.py` from here: without it
the model decodes autoregressively, for which it was not trained.

```python
from block_diffusion import BlockDiffusion
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{name}").merge_and_unload()
model.__class__ = type("Student", (BlockDiffusion, type(model)), {{}})
model.config.update(
    {fields}
)
asked = {asked}
made = model.generate(**asked, max_new_tokens=128, rule="dynamic", threshold=0.9)
print(tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
_CHAT = """tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
_PLAIN = 'tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)'
_ON_POLICY = "on-policy distillation (OPDLM, arXiv 2606.06712)"  # the student's own responses, the base model's targets
_ENGINES = """SGLang, LMDeploy and JetEngine load it as an SDAR; they must be told the block size {size} where their
default is another one, and the mask token {mask} where they do not take that one by themselves."""


def model_card(
    student: Student, name: str, format: Format, evaluation: dict[str, Any] | None = None, licence: str | None = None
) -> str:
    """The card's text.

    Args:
        name: of the folder or repository that it is for.
        evaluation: the content of a results file of `opdlm eval`.
        licence: of the base model, in place of what its own card says.
    """
    run, base = student.run, student.base
    stated = licence_of(run) if run and not licence else None
    licence = licence or stated
    library = "peft" if format == "peft" else "transformers"
    facts: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    facts |= {"license": licence} if licence else {}
    facts |= {"base_model": base} if base and "/" in base else {}
    facts["tags"] = ["block-diffusion", "opdlm"]
    size, mask = student.config.block_size, student.config.mask_token_id
    asked = _CHAT if student.tokenizer.chat_template else _PLAIN
    parts = [
        f"---\n{yaml.safe_dump(facts, sort_keys=False)}---",
        f"# {name}",
        f"A block-diffusion language model: a {student.origin}. It writes its text in blocks of {size} tokens, of "
        "which each forward reveals one or several. It was not trained to be decoded autoregressively.",
        "## Loading\n" + (_PEFT if format == "peft" else _LOADING).format(
            name=name, asked=asked, base=base or "BASE", fields=pformat(student.described(), width=100)
        ),
    ]  # fmt: skip
    parts += [_ENGINES.format(size=size, mask=mask)] if format == "sdar" else []
    parts += [_training(run, base or run.base)] if run else []
    scores = _evaluated(evaluation) if evaluation else _summarised(run.summary) if run else ""
    parts += [scores] if scores else []
    of = base or "another model"
    named = f"`{licence}`" + (f", as {of} states it" if stated else "")
    unknown = f"that of {base or 'that model'}, whose files here do not name it"
    parts.append(f"## Licence\nThe weights are derived from {of}. Licence: {named if licence else unknown}.")
    return "\n\n".join(parts) + "\n"


def read_results(file: Path) -> dict[str, Any]:
    """The results that `opdlm eval --output` wrote.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--eval: {str(file)!r} cannot be read ({error}); give the .json of opdlm eval") from error
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise ConfigError(f"--eval: {str(file)!r} holds no results of this release; give the .json of opdlm eval")
    return content


def licence_of(run: RunRecord) -> str | None:
    """What the card in the base model's folder says; None: the folder is elsewhere, or has none."""
    file = Path(run.config.model.path) / CARD
    found = ModelCard.load(file, ignore_metadata_errors=True).data.license if file.is_file() else None
    return str(found) if found else None


def _training(run: RunRecord, base: str) -> str:
    manifest, metrics, summary = run.manifest, run.metrics, run.summary
    rows = {
        "base model": base,
        "method": _method(run.config),
        "prompts": public_name(str(run.config.data.prompts)),
        "response tokens": _number(manifest.get("response_tokens")),
        "updates": _number(manifest.get("updates")),
        "divergence of the last rollout batch, nats/token": _number(metrics.get("kl")),
        "held-out KL before the training, nats/token": _number(summary.get("held_out_kl_init", {}).get("mean")),
        "held-out KL, nats/token": _number(summary.get("held_out_kl", {}).get("mean")),
        "GPU hours": _number(summary.get("train", {}).get("gpu_hours")),
    }
    settings = run.config.model_dump(mode="json", include=_SETTINGS, exclude_defaults=True)
    written = yaml.safe_dump({name: own for name, own in settings.items() if own != {}}, sort_keys=False).strip()
    return (
        "## Training\n"
        + _table(["", ""], [[name, value] for name, value in rows.items() if value])
        + f"\n\nWhat was set, beside the defaults of the release:\n\n```yaml\n{written}\n```"
    )


def _method(config: RunConfig) -> str:
    objective = config.objective
    if objective.method:
        return objective.method
    choices = (objective.source, objective.state, objective.target, objective.divergence)
    named = ", ".join(
        f"{word} {choice.kind}"
        for word, choice in zip(("source", "state", "target", "divergence"), choices, strict=True)
    )
    on_policy = (objective.source.kind, objective.target.kind) == ("student", "teacher")
    return f"{_ON_POLICY}: {named}" if on_policy else named


def _summarised(summary: dict[str, Any]) -> str:
    """The evaluation at the end of the run."""
    student = summary.get("student", {})
    measured = {
        ("original", "autoregressive, greedy"): summary.get("teacher"),
        ("converted, untrained", "static"): summary.get("student_init"),
        ("this model", "static"): student.get("static"),
        ("this model", "dynamic"): student.get("dynamic"),
    }
    rows = [
        [*who, f"{m['exact_match']:.1%}", f"{m['tokens_per_step']:.2f}", str(m["problems"])]
        for who, m in measured.items()
        if m
    ]
    head = ["model", "decoding", "exact match", "tokens per step", "problems"]
    return "## Scores\nOn the held-out problems of the run.\n\n" + _table(head, rows) if rows else ""


def _evaluated(results: dict[str, Any]) -> str:
    rows = []
    for row in results["rows"]:
        score, steps = row["metrics"][row["score"]], row["metrics"]["tokens_per_step"]["mean"]
        if score["mean"] is None:
            continue
        low, high = score["interval"] or (None, None)
        against = score["difference"]
        rows.append(
            [
                row["suite"],
                "this model" if row["model"] == "student" else "original",
                row["decoding"],
                f"{score['mean']:.1%}" + (f" ({low:.1%} to {high:.1%})" if low is not None else ""),
                f"{100 * against[0]:+.1f}" if against else "",
                "" if steps is None else f"{steps:.2f}",
                str(row["problems"]),
            ]
        )
    head = ["suite", "model", "decoding", "score (95%)", "minus original", "tokens per step", "problems"]
    said = (
        "By `opdlm eval`; differences are in points, paired by problem. AR: autoregressive; static N: N tokens a step; "
        "dynamic P: all tokens of a confidence above P."
    )
    return f"## Scores\n{said}\n\n" + _table(head, rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | None) -> str:
    """Empty where there is none, or nothing was counted."""
    if not value:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
