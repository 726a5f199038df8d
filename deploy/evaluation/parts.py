"""Responses of `opdlm eval` that are on disk already, so that an interrupted command goes on where it stood.

OUTPUT.parts holds a file for each chunk of requests. Its name ends in a hash of all that its responses depend on: the
model's files, how it decodes, and the requests. So the same command, or one with further suites and settings, takes
what fits, and nothing that does not.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from actors.evaluation.responses import Response
from actors.evaluation.worker import Answered, Chunk
from deploy.files import replace_text
from deploy.named_files import writing


class Parts:
    """The parts of one output; without a folder nothing is kept."""

    def __init__(self, output: Path | None) -> None:
        self.folder = output.with_name(output.name + ".parts") if output else None

    def load(self, name: str, chunk: Chunk, identity: dict[str, Any]) -> Answered | None:
        """The responses to a chunk, if an earlier command left them."""
        file = self._file(name, chunk, identity)
        if file is None or not file.is_file():
            return None
        part = json.loads(file.read_text())
        responses = [Response(**{**r, "ids": np.asarray(r["ids"], np.int32)}) for r in part["responses"]]
        return Answered(chunk.index, responses, part["seconds"])

    def save(self, name: str, chunk: Chunk, identity: dict[str, Any], answered: Answered) -> None:
        """Whole or not at all."""
        if (file := self._file(name, chunk, identity)) is None:
            return
        responses = [{**vars(response), "ids": response.ids.tolist()} for response in answered.responses]
        with writing("--output", file):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, json.dumps({"seconds": answered.seconds, "responses": responses}))

    def remove(self) -> None:
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str, chunk: Chunk, identity: dict[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        for request in chunk.requests:
            of_request = [request.ordinal, request.sample, request.max_new_tokens, request.stop]
            digest.update(json.dumps(of_request).encode())
            digest.update(request.prompt_ids.astype("<i4").tobytes())
        return self.folder / f"{name}-{chunk.index:05d}-{digest.hexdigest()[:16]}.json"
