"""What clients ask: the bodies of OpenAI's API and our extensions to them, checked field by field."""

from __future__ import annotations

import json
import math
import secrets
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from actors.sampler.sampling import Decoding
from common.chat import ChatTemplate
from common.config.errors import ConfigError
from common.config.shown import shown
from common.config.values import far_from_zero
from common.conversations import QUESTION, Conversation, Turn
from common.datasets.errors import PromptError
from common.grid import grid_floor
from common.prompts import Row, tokenised
from common.vocabulary import token_count
from deploy.evaluation.decoding_options import DEFAULT_LOWER, DEFAULT_THRESHOLD, RuleName, unmasking_of
from deploy.serving.errors import ApiError, refused

Verifier = Literal["self", "base"] | None  # of the speculative rule; None: there is none
MOST_CHOICES = 128  # sequences of one request
LARGEST_BLOCK = 256

# what OpenAI's API has and this server has not: the values that ask for nothing, and why
_ABSENT: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), "a student is not trained to call tools"),
    "tool_choice": (("none", "auto"), "a student is not trained to call tools"),
    "functions": (([],), "a student is not trained to call tools"),
    "function_call": (("none", "auto"), "a student is not trained to call tools"),
    "response_format": (({"type": "text"},), "there is no JSON mode: blocks are not decoded under a grammar"),
    "logit_bias": (({},), "tokens are not biased"),
    "frequency_penalty": ((0,), "there are no penalties"),
    "presence_penalty": ((0,), "there are no penalties"),
    "top_logprobs": ((0,), "only the confidence of the chosen token is kept"),
    "echo": ((False,), "the prompt is not repeated; likelihoods come from opdlm lm-eval"),
    "suffix": (("",), "nothing is written before a given end"),
    "best_of": ((1,), "sequences are not ranked"),
    "modalities": ((["text"],), "there is text only"),
    "audio": ((), "there is text only"),
    "prediction": ((), "predicted outputs are not used"),
}
_IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
)  # fmt: skip


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool = False


class _Ask(BaseModel):
    """What both endpoints take. Extensions: top_k, rule, threshold, lower, block_size, reveal_order, stream_rounds."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=0, lt=2**64)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    rule: Literal["static", "dynamic", "sequential", "entropy_bound", "adaptive", "speculative"] | None = None
    threshold: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    lower: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    block_size: int | None = Field(None, ge=1, le=LARGEST_BLOCK)
    reveal_order: bool = False
    stream_rounds: bool = False

    @property
    def limit(self) -> int | None:
        return self.max_tokens


class ChatAsk(_Ask):
    """The body of /v1/chat/completions."""

    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionAsk(_Ask):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=1)


AskT = TypeVar("AskT", bound=_Ask)


def read(body: bytes, kind: type[AskT]) -> AskT:
    """The body as an ask.

    Raises:
        ApiError: 400, with the field, the value and the remedy.
    """
    try:
        given = json.loads(body.decode(), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start} of it); encode it in UTF-8") from error
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else error
        raise ApiError(400, f"the body is not JSON ({why}); send a JSON object") from error
    if not isinstance(given, dict):
        raise ApiError(400, f"the body is {shown(given)}; send a JSON object")
    for name, (nothing, reason) in _ABSENT.items():
        value = given.pop(name, None)
        if value is not None and value not in nothing:
            raise refused(name, f"not supported, since {reason}; leave it out")
    for name in _IGNORED:
        given.pop(name, None)
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as invalid:
        raise _explained(invalid.errors(include_url=False), kind) from invalid


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _explained(errors: list[Any], kind: type[BaseModel]) -> ApiError:
    first = errors[0]
    field = str(first["loc"][0])
    path = ".".join(str(part) for part in first["loc"])
    match first["type"]:
        case "extra_forbidden":
            return refused(field, f"unknown field; leave it out. There are {', '.join(kind.model_fields)}")
        case "missing":
            return refused(field, f"{path} is missing; set it")
    message = str(first["msg"]).replace("Input should", "it should")
    if len({error["loc"][0] for error in errors}) == 1 and len(errors) > 1:
        message = str(kind.model_fields[field].annotation).replace("deploy.serving.asked.", "") + " is what it takes"
    return refused(field, f"{path} {shown(first['input'])} is not accepted: {message}")


@dataclass(frozen=True)
class Settings:
    """How the sequences of one request are decoded."""

    decoding: Decoding
    block_size: int
    seed: int
    choices: int
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Prompter:
    """Turns asks into token ids and settings, with the model's limits.

    `longest` is the limit of prompt and response together, in tokens; `most_tokens` the response limit of a request
    that names none; `verify` who verifies under the speculative rule.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: ChatTemplate
    plain: ChatTemplate
    system: str | None
    block_size: int
    longest: int
    most_tokens: int
    decoding: Decoding
    verify: Verifier

    @property
    def rules(self) -> list[str]:
        """The unmasking rules that may be asked for."""
        return [rule for rule in RuleName if self.verify or rule != RuleName.speculative]

    def chat_ids(self, ask: ChatAsk) -> np.ndarray:
        """int32 ids of a conversation, with the chat template applied.

        Raises:
            ApiError: 400, it cannot be asked.
        """
        texts = (m.content if isinstance(m.content, str) else "".join(p.text for p in m.content) for m in ask.messages)
        roles = ("system" if m.role == "developer" else m.role for m in ask.messages)
        turns = tuple(Turn(role, self._whole("messages", text)) for role, text in zip(roles, texts, strict=True))
        if not any(turn.role == "user" for turn in turns):
            raise refused("messages", "no message of the user is there; add one")
        if not turns[-1].text.strip() and turns[-1].role == "user":
            raise refused("messages", "the last one is empty; give a question")
        self._check_characters("messages", sum(len(turn.text) for turn in turns))
        conversation = Conversation(turns, "messages").asked(QUESTION, self.system)
        left_out = Counter[str]()
        try:
            (ids,) = tokenised([Row("messages", conversation.question, conversation)], self.chat, left_out)
        except PromptError as error:
            raise refused("messages", str(error).removeprefix("messages: ")) from error
        assert ids is not None  # a lone row that is refused raises
        return self._checked("messages", ids)

    def plain_ids(self, ask: CompletionAsk) -> list[np.ndarray]:
        """int32 ids of every prompt of a completion, as it is given.

        Raises:
            ApiError: 400, one of them cannot be used.
        """
        given = ask.prompt
        prompts: list[Any] = given if isinstance(given, list) and not _is_ids(given) else [given]
        if not prompts or any(len(prompt) == 0 for prompt in prompts):
            raise refused("prompt", "it is empty; give a text")
        if len(prompts) * (ask.n or 1) > MOST_CHOICES:
            raise refused(
                "prompt", f"{len(prompts)} prompts times n are more than {MOST_CHOICES} sequences; send fewer"
            )
        return [self._checked("prompt", self._plain(prompt)) for prompt in prompts]

    def _plain(self, prompt: Any) -> np.ndarray:
        if isinstance(prompt, str):
            self._check_characters("prompt", len(prompt))
            return self.plain.ids([self._whole("prompt", prompt)])[0]
        tokens = token_count(self.tokenizer)
        if wrong := [number for number in prompt if not 0 <= number < tokens]:
            raise refused("prompt", f"token {wrong[0]} is not one of the {tokens} of the model; send a text")
        return np.asarray(prompt, np.int32)

    def _check_characters(self, field: str, characters: int) -> None:
        """Before a tokenizer takes seconds over what is too long in any case."""
        if characters > 64 * self.longest:
            raise refused(
                field, f"{characters} characters are far more than the {self.longest} tokens of the model; shorten it"
            )

    def _whole(self, field: str, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise refused(field, "the text holds half a character (a surrogate without its pair); remove it") from error
        return text

    def _checked(self, field: str, ids: np.ndarray) -> np.ndarray:
        if not len(ids):
            raise refused(field, "the prompt has no tokens; give a text")
        if self.tokenizer.mask_token_id is not None and self.tokenizer.mask_token_id in ids:
            raise refused(field, f"the prompt holds the mask token {self.tokenizer.mask_token!r}; remove it")
        return ids

    def limit(self, ids: np.ndarray, asked: int | None, block_size: int) -> int:
        """Tokens of the longest response.

        Raises:
            ApiError: 400, prompt and response do not fit.
        """
        room = grid_floor(self.longest, block_size) - len(ids)
        if room < (asked or 1):
            remedy = f"use max_tokens {room} or less" if room > 0 else "shorten the prompt"
            raise ApiError(
                400,
                f"a prompt of {len(ids)} tokens and a response of {asked or 1} do not fit into {self.longest} tokens "
                f"at block size {block_size}; {remedy}",
                field="max_tokens" if room > 0 else "prompt",
                code="context_length_exceeded",
            )
        return asked or min(room, self.most_tokens)

    def settings(self, ask: _Ask) -> Settings:
        """How to decode; what is not asked for is the server's default.

        Raises:
            ApiError: 400, a value cannot be used.
        """
        default = self.decoding
        if ask.rule == "speculative" and not self.verify:
            raise refused(
                "rule",
                "'speculative' needs a student that was trained with attention.context causal, or a server that was "
                "started with the original's folder as --verify; use one of " + ", ".join(self.rules),
            )
        try:
            temperature = far_from_zero(default.temperature if ask.temperature is None else ask.temperature)
        except ValueError as error:
            raise refused("temperature", str(error)) from error
        unmasking = default.unmasking
        if ask.rule or ask.threshold is not None or ask.lower is not None:
            threshold = DEFAULT_THRESHOLD if ask.threshold is None else ask.threshold
            lower = min(DEFAULT_LOWER, threshold) if ask.lower is None else ask.lower
            try:
                unmasking = unmasking_of(ask.rule or "dynamic", threshold, lower, verify=self.verify or "self")
            except ConfigError as error:
                raise refused("lower", str(error).removeprefix("--lower: ").replace("--", "")) from error
        stop = (ask.stop,) if isinstance(ask.stop, str) else tuple(ask.stop or ())
        if "" in stop or len(stop) > 16 or sum(map(len, stop)) > 4096:
            raise refused("stop", "give at most 16 stop strings, none of them empty, 4096 characters together")
        for string in stop:
            self._whole("stop", string)
        return Settings(
            Decoding(unmasking, temperature, max(ask.top_k or 0, 0), 1.0 if ask.top_p is None else ask.top_p),
            ask.block_size or self.block_size,
            secrets.randbits(63) if ask.seed is None else ask.seed,
            ask.n or 1,
            stop,
        )


def prompter_of(
    tokenizer: PreTrainedTokenizerBase,
    asked: dict[str, Any],
    *,
    block_size: int,
    longest: int,
    most_tokens: int,
    decoding: Decoding,
    verify: Verifier = None,
) -> Prompter:
    """`asked`: how the student is asked (deploy/evaluation/asking.py)."""
    chat = ChatTemplate(tokenizer, enable_thinking=bool(asked.get("enable_thinking")))
    plain = ChatTemplate(tokenizer, raw=True)
    system = asked.get("system")
    return Prompter(tokenizer, chat, plain, system, block_size, longest, most_tokens, decoding, verify)


def log_confidence(confidence: float) -> float:
    """A confidence as a log-probability; JSON has no minus infinity."""
    return math.log(confidence) if confidence > 0 else -9999.0


def _is_ids(given: list[Any]) -> bool:
    return bool(given) and isinstance(given[0], int)
