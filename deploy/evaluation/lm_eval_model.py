"""The student as a model of lm-evaluation-harness.

    opdlm lm_eval --model opdlm --model_args pretrained=FOLDER,threshold=0.9 --tasks gsm8k --apply_chat_template

lm_eval finds models in a registry that its own modules fill and has no discovery of plug-ins, so somebody has to
import this module first: `opdlm lm_eval` does, and then hands its arguments to lm_eval's command line. In Python,
`import deploy.evaluation.lm_eval_model` before `lm_eval.simple_evaluate(model="opdlm", ...)` does the same.

Generation tasks decode by block diffusion; likelihood tasks use an estimate of actors/evaluation/likelihood.py.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from actors.evaluation.generation import load_student, sampler_of
from actors.evaluation.likelihood import Estimate, Method, log_likelihoods
from actors.sampler.request import Request
from actors.sampler.sampling import Decoding
from actors.sampler.stop_strings import before_stop
from common.chat import template_options
from common.config.errors import ConfigError
from common.config.paths import expanded
from common.end_tokens import response_text
from common.grid import grid_floor
from deploy.evaluation.asking import asked_like_training, check_thinking
from deploy.evaluation.decoding_options import DEFAULT_LOWER, DEFAULT_THRESHOLD, RuleName, unmasking_of
from deploy.model_checks import check_student_folder, check_verifies, model_errors

DEFAULT_MAX_TOKENS = 256


@register_model("opdlm")
class BlockDiffusionLM(TemplateLM):
    """A student's folder behind lm_eval's interface.

    Args (of `--model_args`):
        pretrained: folder of a trained or converted student.
        rule, threshold, lower, block_size: how generation tasks are decoded, as in `opdlm eval`.
        likelihood, mc_samples: the estimate of likelihood tasks, `sequential` or `bound`; see
            actors/evaluation/likelihood.py.
        max_length: tokens of context and response; default: the model's positions.
        max_gen_toks: response length limit where the task names none.
        slots: sequences decoded at the same time; no result depends on it. lm_eval's own `--batch_size` (1 unless
            given) is used where it is above 1.
        token_budget: tokens of one forward in likelihood tasks, clean and noised.
        dtype, device: of the model; default: float32, CUDA where there is one.
        enable_thinking: passed to the chat template; default: as the student was trained. The command line's
            `--thinking` and `--no-thinking` set it.
        seed: of sampled decoding (`do_sample` tasks) and of the sampled bound.
    """

    def __init__(
        self,
        pretrained: str,
        rule: str = "dynamic",
        threshold: float = DEFAULT_THRESHOLD,
        lower: float = DEFAULT_LOWER,
        block_size: int | None = None,
        likelihood: Method = "sequential",
        mc_samples: int = 64,
        max_length: int | None = None,
        max_gen_toks: int = DEFAULT_MAX_TOKENS,
        slots: int = 64,
        batch_size: int | str = 1,
        token_budget: int = 8192,
        dtype: str = "float32",
        device: str | None = None,
        enable_thinking: bool | None = None,
        seed: int = 0,
        **unused: Any,
    ) -> None:
        super().__init__()
        unused.pop("max_batch_size", None)  # given to every model
        _check(unused, rule=(rule, list(RuleName)), likelihood=(likelihood, get_args(Method)))
        try:
            pretrained = expanded(pretrained)
        except ValueError as error:
            raise ConfigError(f"--model_args pretrained: {error}") from error
        check_student_folder("--model_args pretrained", pretrained)
        check_verifies("--model_args pretrained", pretrained, [rule])
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # lm_eval's command line says cuda:0 unless told otherwise
        self.pretrained = pretrained
        with model_errors("--model_args pretrained", pretrained):
            self.model, self.tokenizer = load_student(pretrained, dtype, device)
        self.block_size = int(block_size or self.model.config.block_size)
        slots = int(batch_size) if str(batch_size).isdigit() and int(batch_size) > 1 else slots
        self.sampler = sampler_of(self.model, self.tokenizer, block_size=self.block_size, slots=slots, seed=seed)
        self.unmasking = unmasking_of(rule, threshold, lower)
        check_thinking("enable_thinking", enable_thinking, self.tokenizer)
        self.enable_thinking = bool(asked_like_training(pretrained, enable_thinking).get("enable_thinking"))
        self.estimate = Estimate(likelihood, mc_samples, seed)
        self.max_length = int(max_length or self.model.config.max_position_embeddings)
        self.max_gen_toks = max_gen_toks
        self.token_budget = token_budget
        self.response_tokens = self.denoise_forwards = 0
        self._device = self.sampler.device
        self._sampled_calls = 0

    @property
    def eot_token_id(self) -> int:
        return int(self.model.generation_config.eos_token_id[0])

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Goes into the results file, with the tokens per step of all generation tasks so far."""
        tokens_per_step = self.response_tokens / self.denoise_forwards if self.denoise_forwards else None
        return {
            "pretrained": self.pretrained,
            "block_size": self.block_size,
            "unmasking": self.unmasking.model_dump(),
            "likelihood": self.estimate.method,
            "tokens_per_step": tokens_per_step,
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Never adds special tokens: neither training nor decoding does."""
        return list(self.tokenizer(string, add_special_tokens=False)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **template_options(self.enable_thinking),
            )
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """One decoding run per distinct set of sampling settings; texts end before the first stop string."""
        texts: dict[int, str] = {}
        for decoding, members in self._by_decoding(requests).items():
            parsed = {index: self._generation_arguments(requests[index]) for index in members}
            queue = [self._request(index, requests[index].args[0], *parsed[index][1:]) for index in members]
            for trajectory in self.sampler.generate(queue, decoding):
                index = trajectory.ordinal
                text = response_text(self.tokenizer, trajectory.response_ids, self.sampler.eos_token_id)
                texts[index] = before_stop(text, parsed[index][2])
                self.response_tokens += len(trajectory.response_ids)
                self.denoise_forwards += trajectory.denoise_forwards
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
            self._sampled_calls += decoding.temperature > 0  # another call gives other samples
        return [texts[index] for index in range(len(requests))]

    def _by_decoding(self, requests: list[Instance]) -> dict[Decoding, list[int]]:
        groups: dict[Decoding, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._generation_arguments(request)[0], []).append(index)
        return groups

    def _generation_arguments(self, request: Instance) -> tuple[Decoding, int, tuple[str, ...]]:
        """Decoding, response limit in tokens, and stop strings of a request."""
        arguments = normalize_gen_kwargs(dict(request.args[1]), default_max_gen_toks=self.max_gen_toks)
        temperature = float(arguments["temperature"]) if arguments["do_sample"] else 0.0
        top_k, top_p = int(arguments.get("top_k") or 0), float(arguments.get("top_p") or 1.0)
        stops = tuple(stop for stop in arguments["until"] if stop)
        return Decoding(self.unmasking, temperature, top_k, top_p), int(arguments["max_gen_toks"]), stops

    def _request(self, index: int, context: str, limit: int, stops: tuple[str, ...]) -> Request:
        """A context that is too long loses its beginning."""
        room = grid_floor(self.max_length, self.block_size) - limit
        if room < 1:
            raise ConfigError(
                f"max_gen_toks: {limit} leaves no room for a context in {self.max_length} positions; lower it"
            )
        ids = (self.tok_encode(context) or [self.eot_token_id])[-room:]
        return Request(index, self._sampled_calls, np.asarray(ids, dtype=np.int32), limit, stop=stops)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        results = [(found.log_prob, found.greedy) for found in self._likelihoods(pairs)]
        for (strings, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", strings, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Sum over windows of `max_length` tokens, each with as much context as fits."""
        windows: list[tuple[list[int], list[int]]] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            for window in self._windows(request.args[0]):
                windows.append(window)
                owner.append(index)
        log_prob = [0.0] * len(requests)
        for index, found in zip(owner, self._likelihoods(windows), strict=True):
            log_prob[index] += found.log_prob
        for request, value in zip(requests, log_prob, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return log_prob

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        ids = self.tok_encode(text)
        length = grid_floor(self.max_length, self.block_size) - 1
        for window in get_rolling_token_windows(ids, self.prefix_token_id, length, context_len=1):
            yield make_disjoint_window(window)

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """A pair that is too long loses the beginning of its context."""
        positions = grid_floor(self.max_length, self.block_size)
        if len(continuation) >= positions:
            raise ConfigError(f"a continuation of {len(continuation)} tokens does not fit into {positions} positions")
        return context[-(positions - len(continuation)) :], continuation

    def _likelihoods(self, pairs: list[tuple[list[int], list[int]]]) -> list[Any]:
        return log_likelihoods(
            self.model,
            pairs,
            block_size=self.block_size,
            mask_token_id=self.sampler.mask_token_id,
            estimate=self.estimate,
            token_budget=self.token_budget,
        )


def _check(unknown: dict[str, Any], **choices: tuple[str, Any]) -> None:
    if unknown:
        raise ConfigError(f"--model_args: unknown {sorted(unknown)}; see the arguments of {BlockDiffusionLM.__name__}")
    for name, (value, allowed) in choices.items():
        if value not in list(allowed):
            raise ConfigError(f"--model_args: {name}={value!r} is unknown; choose {', '.join(map(str, allowed))}")


def main(arguments: list[str], thinking: bool | None = None) -> None:
    """lm_eval's own command line, with the model `opdlm` known to it; `thinking` is one more of its arguments.

    Raises:
        ConfigError: lm_eval refuses its arguments, such as a task that it does not know.
    """
    from lm_eval.__main__ import cli_evaluate

    if thinking is not None:
        arguments = [*arguments, "--model_args", f"enable_thinking={thinking}"]
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals["__name__"].startswith("lm_eval.config"):
            raise  # not about its arguments
        raise ConfigError(f"lm_eval: {error}; see its options with opdlm lm_eval --help") from error
