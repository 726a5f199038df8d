"""What clients get: the bodies and the streamed chunks of OpenAI's API, and our extensions to them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.evaluation.responses import said
from actors.sampler.slots import WrittenBlock
from actors.sampler.stop_strings import before_stop
from common.end_tokens import response_text
from common.trajectory import EndTokens, Trajectory, without_end
from deploy.serving.asked import log_confidence
from deploy.serving.jobs import Job

_REPLACEMENT = "\ufffd"  # a character whose bytes are not all there


@dataclass(frozen=True)
class Form:
    """What all replies to one request have in common."""

    chat: bool
    model: str
    logprobs: bool
    reveal_order: bool
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    def head(self, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.number}", "object": kind, "created": self.created, "model": self.model}


def usage(jobs: list[Job], prompts: int) -> dict[str, Any]:
    """Counts of one request; a prompt is counted once for all its choices. Steps are denoising forwards."""
    done = [job.trajectory for job in jobs if job.trajectory]
    prompt = sum(len(job.request.prompt_ids) for job in jobs[:: len(jobs) // prompts])
    tokens, steps = sum(len(t.response_ids) for t in done), sum(t.denoise_forwards for t in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "steps": steps,
        "tokens_per_step": round(tokens / max(steps, 1), 4),
    }


class Reader:
    """What is new of one job, as text and as choices of chunks; the text of all pieces together is that of the reply.

    A piece never ends within a character, nor with what may turn out to begin a stop string.
    """

    def __init__(self, job: Job, index: int, form: Form, tokenizer: PreTrainedTokenizerBase, ends: EndTokens) -> None:
        self.job = job
        self.index = index
        self.form = form
        self._tokenizer = tokenizer
        self._ends = ends
        self._start = len(job.request.prompt_ids)
        self._sent = ""
        self._tokens_sent = 0
        self._ids: list[int] = []
        self._confidence: list[float] = []
        self._rounds: list[int] = []
        self._shown: dict[int, bytes] = {}  # what was last sent of each block that is not finished
        self._begun = False

    def choice(self) -> dict[str, Any]:
        """The whole reply of a job that has ended."""
        trajectory = self._trajectory
        text = said(self._tokenizer, trajectory.response_ids, self._ends, self.job.request.stop)
        self._take_all(trajectory)
        body = {"message": {"role": "assistant", "content": text}} if self.form.chat else {"text": text}
        return self._choice(body, 0, _finish(trajectory))

    def chunks(self) -> Iterator[dict[str, Any]]:
        """Choices of the chunks that have become due, the last one with its finish_reason."""
        if not self._begun:
            self._begun = True
            if self.form.chat:
                delta = {"role": "assistant", "content": ""}
                yield {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}
        trajectory = self.job.trajectory
        if self.job.rounds:
            for block in list(self.job.blocks.values()):
                yield from self._round(block)
        if trajectory is None:
            blocks = {start: block for start, block in list(self.job.blocks.items()) if not block.masked.any()}
            while known := blocks.get((self._start + len(self._ids)) // self.job.block_size * self.job.block_size):
                skip = self._start + len(self._ids) - known.start
                self._ids += known.ids[skip:].tolist()
                self._confidence += known.confidence[skip:].tolist()
                self._rounds += known.reveal_round[skip:].tolist()
            text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True)) if self._ids else ""
            text = _without_open_stop(before_stop(text, self.job.request.stop), self.job.request.stop)
            text = text.rstrip(_REPLACEMENT)
            new = text[len(self._sent) :] if text.startswith(self._sent) else ""
            if not new:
                return
            self._sent += new
            yield self._choice(self._delta(new), self._tokens_sent, None)
            self._tokens_sent = len(self._ids)
            return
        if self.job.rounds:
            yield from self._last_round(trajectory)
        text = said(self._tokenizer, trajectory.response_ids, self._ends, self.job.request.stop)
        self._take_all(trajectory)
        yield self._choice(self._delta(text[len(self._sent) :]), self._tokens_sent, _finish(trajectory))

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if self.form.chat else {"text": text}

    @property
    def _trajectory(self) -> Trajectory:
        assert self.job.trajectory
        return self.job.trajectory

    def _take_all(self, trajectory: Trajectory) -> None:
        said_ids = without_end(trajectory.response_ids, self._ends)
        self._ids = said_ids.tolist()
        self._confidence = trajectory.confidence[: len(said_ids)].tolist()
        self._rounds = trajectory.reveal_round[: len(said_ids)].tolist()

    def _choice(self, body: dict[str, Any], first: int, finish: str | None) -> dict[str, Any]:
        choice = {"index": self.index, **body, "logprobs": None, "finish_reason": finish}
        if self.form.logprobs or self.form.reveal_order:
            texts = [str(self._tokenizer.decode([token])) for token in self._ids[first:]]
        if self.form.logprobs:
            values = [log_confidence(confidence) for confidence in self._confidence[first:]]
            choice["logprobs"] = _chat_logprobs(texts, values) if self.form.chat else _logprobs(texts, values)
        if self.form.reveal_order:
            blocks = ((self._start + np.arange(first, len(self._ids))) // self.job.block_size).tolist()
            rows = zip(texts, blocks, self._rounds[first:], self._confidence[first:], strict=True)
            choice["reveal_order"] = [
                {"token": text, "block": block, "round": round_, "confidence": confidence}
                for text, block, round_, confidence in rows
            ]
        return choice

    def _round(self, block: WrittenBlock) -> Iterator[dict[str, Any]]:
        """A chunk without text that says what is revealed of a block: null where it is masked."""
        state = block.masked.tobytes()
        if self._shown.get(block.start) == state or block.masked.all():
            return
        self._shown[block.start] = state
        skip = max(self._start - block.start, 0)
        texts = [None if m else self._piece(i) for i, m in zip(block.ids[skip:], block.masked[skip:], strict=True)]
        yield self._rounds_chunk(block.start + skip, texts, block.reveal_round[skip:].tolist())

    def _last_round(self, trajectory: Trajectory) -> Iterator[dict[str, Any]]:
        """The whole response, up to what ended it: the last block in its last round is not seen before the end."""
        said_ids = without_end(trajectory.response_ids, self._ends)
        pieces: list[str | None] = [*self._pieces(said_ids.tolist())]
        rounds = trajectory.reveal_round[: len(said_ids)].tolist()
        yield self._rounds_chunk(self._start, pieces, rounds, whole=True)

    def _rounds_chunk(
        self, position: int, texts: list[str | None], rounds: list[int], whole: bool = False
    ) -> dict[str, Any]:
        revealed = [None if text is None else round_ for text, round_ in zip(texts, rounds, strict=True)]
        state = {"offset": position - self._start, "texts": texts, "rounds": revealed, "whole": whole}
        return {"index": self.index, **self._delta(""), "logprobs": None, "finish_reason": None, "blocks": state}

    def _piece(self, token: int) -> str:
        text = response_text(self._tokenizer, np.asarray([token]), self._ends)
        begins_a_word = str(self._tokenizer.convert_ids_to_tokens(int(token))).startswith(
            "▁"
        )  # as SentencePiece has it
        return f" {text}" if begins_a_word and not text.startswith(" ") else text

    def _pieces(self, ids: list[int]) -> Iterator[str]:
        """The text of each token; a character of several tokens stands at the last one."""
        begun: list[int] = []
        for token in ids:
            begun.append(token)
            text = self._piece(token) if len(begun) == 1 else str(self._tokenizer.decode(begun))
            if text.endswith(_REPLACEMENT) and len(begun) < 4:
                yield ""
            else:
                yield text
                begun = []


def _finish(trajectory: Trajectory) -> str:
    return "length" if trajectory.finish_reason == "length" else "stop"


def _without_open_stop(text: str, stops: tuple[str, ...]) -> str:
    """The text without an end that may begin a stop string."""
    held = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), held, -1):
            if text.endswith(stop[:length]):
                held = length
                break
    return text[: len(text) - held]


def _chat_logprobs(texts: list[str], values: list[float]) -> dict[str, Any]:
    content = [
        {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
        for text, value in zip(texts, values, strict=True)
    ]
    return {"content": content, "refusal": None}


def _logprobs(texts: list[str], values: list[float]) -> dict[str, Any]:
    offsets = np.cumsum([0, *map(len, texts)])[:-1].tolist()
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}
