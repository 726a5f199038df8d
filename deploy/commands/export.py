"""`opdlm export`: a student as other programs load it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from common.config.errors import ConfigError
from deploy.argument_checks import a_path
from deploy.commands.console import say
from deploy.named_files import check_writable, writing

Format = Annotated[
    Literal["hf", "sdar", "peft"],
    typer.Option(
        "--format",
        help="hf: for transformers, with code that decodes by block diffusion; sdar: for SGLang, LMDeploy and "
        "JetEngine too, a Qwen3 alone; peft: an adapter alone",
    ),
]


def register(app: typer.Typer) -> None:
    app.command()(export)


def export(
    model: Annotated[
        str, typer.Argument(help="folder of a trained or converted student", metavar="MODEL", callback=a_path)
    ],
    out: Annotated[Path, typer.Argument(help="folder to write", metavar="OUT", callback=a_path)],
    format: Format = "hf",
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", help="results of opdlm eval, a .json file, for the model card", callback=a_path),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="of the base model, such as apache-2.0; default: what its own card says"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="hub id of the model that it was made of, for the card; default: what the run calls it",
            metavar="ORGANISATION/NAME",
        ),
    ] = None,
    card_only: Annotated[
        bool, typer.Option("--card-only", help="write the card of OUT, which is exported already, anew")
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="upload OUT to this repository of the hub", metavar="ORGANISATION/NAME")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="a repository that --push makes is private")] = False,
) -> None:
    """Write a student as a folder that other programs load, and that none decodes autoregressively by mistake.

    Its model card, README.md, is written from the run where MODEL lies in a run's folder.

    [bold]Examples[/bold]

        opdlm export runs/tiny/checkpoints/final exported

        opdlm export runs/mine/checkpoints/final mine --format sdar --eval eval.json --push me/mine
    """
    if card_only and not (out / "block_diffusion.py").is_file():
        raise ConfigError(f"OUT: {str(out)!r} is no exported folder; leave --card-only out to write one")
    if not card_only and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT: {str(out)!r} exists; choose another folder, or remove it")
    from deploy.model_checks import check_student_folder, model_errors

    check_student_folder("MODEL", model)
    if not Path(model).is_dir():
        raise ConfigError(f"MODEL: {model!r} is no folder on this machine; download it first")
    check_writable("OUT", out)
    from deploy.export.exported_folder import read_student, write_exported
    from deploy.export.hf import write_hf
    from deploy.export.hub import check_repository, push_folder
    from deploy.export.model_card import CARD, model_card, read_results
    from deploy.export.peft import check_peft, write_peft
    from deploy.export.sdar import check_sdar, sdar_notes, write_sdar

    for option, repository in (("--push", push), ("--base", base)):
        if repository:
            check_repository(option, repository)
    results = read_results(evaluation) if evaluation else None
    with model_errors("MODEL", model):
        student = read_student(Path(model), base)
        if format == "sdar":
            check_sdar(student)
        if format == "peft":
            check_peft(student)
        with writing("OUT", out):
            if not card_only:
                write_exported(student, out, {"hf": write_hf, "sdar": write_sdar, "peft": write_peft}[format])
            card = model_card(student, push or out.resolve().name, format, results, licence)
            (out / CARD).write_text(card, encoding="utf-8")
    for note in sdar_notes(student) if format == "sdar" else ():
        say(note)
    say(f"wrote {out / CARD}" if card_only else f"wrote {out}; {CARD} in it says how to load it")
    if push:
        say(f"pushed to {push_folder(out, push, private)}")
