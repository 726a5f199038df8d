"""The original beside the student: an autoregressive model that answers the page, one visitor after the other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from common.end_tokens import response_text


class Original:
    """Life cycle: constructed on a loaded causal LM; `pieces` any number of times, each waits for the one before."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self._worker = ThreadPoolExecutor(1, "original")

    async def pieces(self, ids: np.ndarray, max_new_tokens: int, temperature: float) -> AsyncGenerator[dict[str, Any]]:
        """Text as it is written, with the number of tokens so far; leaving early ends the generation."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[list[int] | None] = asyncio.Queue()
        writer = _Writer(loop, queue)
        work = loop.run_in_executor(self._worker, self._generate, ids, max_new_tokens, temperature, writer)
        work.add_done_callback(lambda _: queue.put_nowait(None))
        written: list[int] = []
        sent = ""
        try:
            while (tokens := await queue.get()) is not None:
                written += tokens
                text = response_text(self.tokenizer, np.asarray(written), self.model.generation_config.eos_token_id)
                if not text.endswith("\ufffd"):
                    yield {"text": text[len(sent) :], "tokens": len(written)}
                    sent = text
            work.result()
        finally:
            writer.left.set()

    @torch.inference_mode()
    def _generate(self, ids: np.ndarray, max_new_tokens: int, temperature: float, writer: _Writer) -> None:
        prompt = torch.from_numpy(ids.astype(np.int64))[None].to(self.model.device)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            streamer=writer,
            stopping_criteria=[writer],
            **(sampling if temperature else greedy),
        )


class _Writer(BaseStreamer, StoppingCriteria):
    """Hands tokens to the event loop, and ends the generation when nobody reads on."""

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[list[int] | None]) -> None:
        self.left = threading.Event()
        self._loop = loop
        self._queue = queue
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        pass

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.left.is_set(), device=input_ids.device)
