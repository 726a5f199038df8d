"""`opdlm lm_eval`: lm-evaluation-harness with the model `opdlm` known to it."""

from __future__ import annotations

from importlib.util import find_spec

import typer

from common.config.errors import ConfigError
from deploy.evaluation.asking import Thinking


def register(app: typer.Typer) -> None:
    app.command(
        "lm_eval",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        options_metavar="[OPTIONS OF lm_eval]",
    )(lm_eval)


def lm_eval(context: typer.Context, thinking: Thinking = None) -> None:
    """Run lm-evaluation-harness with the model `opdlm`; all options but --thinking are those of lm_eval.

    [bold]Example[/bold]

        opdlm lm_eval --model opdlm --model_args pretrained=runs/mine/checkpoints/final --tasks gsm8k
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("lm_eval: lm-evaluation-harness is not installed; install opdlm[eval]")
    from deploy.evaluation import lm_eval_model as harness

    harness.main(context.args, thinking)
