"""The folder that the served weights come from, which may be read again while requests run."""

from __future__ import annotations

import threading
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.evaluation.generation import load_student
from common.config.errors import ConfigError
from common.vocabulary import token_count
from deploy.model_checks import StudentPath, check_student_folder, model_errors
from deploy.serving.engine import Engine
from deploy.serving.errors import ApiError

_OF_NO_ACCOUNT = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache")


class StudentFolder:
    """Constructed with what was loaded from it, before anything of that is changed; `reload` any number of times."""

    def __init__(self, at: StudentPath, dtype: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.at = at
        self._dtype = dtype
        self._facts = _facts(model, tokenizer)
        self._reading = threading.Lock()

    def reload(self, engine: Engine) -> int:
        """Read the weights, and give them to the engine; returns their version. Blocks, so it wants a thread.

        Raises:
            ApiError: 409, the folder is being read already, or holds another model than the one that is served; 503,
                the engine has ended. The old weights are served on.
        """
        if not self._reading.acquire(blocking=False):
            raise ApiError(409, "the weights are being read already; wait for that", code="reload_failed")
        try:
            check_student_folder(self.at.field, self.at.folder, self.at.base)
            with model_errors(self.at.field, self.at.folder):
                model, tokenizer = load_student(self.at.folder, self._dtype, "cpu", self.at.base)
            self._check_same(model, tokenizer)
            return engine.swap(list(model.named_parameters()))
        except ConfigError as error:
            raise ApiError(409, f"{error}; the old weights are served on", code="reload_failed") from error
        finally:
            self._reading.release()

    def _check_same(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Weights alone are swapped, so all else must be as it was."""
        facts = _facts(model, tokenizer)
        names = self._facts.keys() | facts.keys()
        if other := sorted(name for name in names if self._facts.get(name) != facts.get(name)):
            raise ConfigError(
                f"{self.at.field}: {self.at.folder!r} differs from the model that is served in {', '.join(other)}; "
                "start a new server"
            )


def _facts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that the server uses of a folder beside the values of its weights."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _OF_NO_ACCOUNT}
    return config | {
        "shapes of weights": {name: parameter.shape for name, parameter in model.named_parameters()},
        "end tokens": model.generation_config.eos_token_id,
        "number of tokens": token_count(tokenizer),
        "chat template": tokenizer.chat_template,
    }
