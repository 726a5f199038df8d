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
    Literal["hf", "sdar"],
    typer.Option(
        "--format",
        help="hf: for transformers, with code that decodes by block diffusion; sdar: for SGLang, LMDeploy and "
        "JetEngine too, a Qwen3 alone",
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
) -> None:
    """Write a student as a folder that other programs load, and that none decodes autoregressively by mistake.

    [bold]Example[/bold]

        opdlm export runs/tiny/checkpoints/final exported

        python -c 'from transformers import AutoModelForCausalLM as M;
        M.from_pretrained("exported", trust_remote_code=True)'
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT: {str(out)!r} exists; choose another folder, or remove it")
    from deploy.model_checks import check_student_folder, model_errors

    check_student_folder("MODEL", model)
    if not Path(model).is_dir():
        raise ConfigError(f"MODEL: {model!r} is no folder on this machine; download it first")
    check_writable("OUT", out)
    from deploy.export.exported_folder import read_student, write_exported
    from deploy.export.hf import write_hf
    from deploy.export.sdar import check_sdar, sdar_notes, write_sdar

    with model_errors("MODEL", model):
        student = read_student(Path(model))
        if format == "sdar":
            check_sdar(student)
        with writing("OUT", out):
            write_exported(student, out, write_sdar if format == "sdar" else write_hf)
    for note in sdar_notes(student) if format == "sdar" else ():
        say(note)
    say(f"wrote {out}: AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True).generate(...)")
