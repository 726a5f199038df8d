"""Two servers behind one port: the answers of one, also while one of them is replaced."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import torch

from actors.evaluation.generation import load_student, sampler_of
from actors.sampler.request import Request
from actors.sampler.sampling import Decoding
from common.config.unmasking import StaticUnmasking
from common.conversion import convert_folder
from common.trajectory import without_end
from deploy.dashboard.process import free_port
from tests.models import tiny_qwen3

pytest.importorskip("grpc_reflection")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]
KEY, TOKENS = "0123456789abcdef", 40
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    convert_folder(tiny_qwen3(folder / "arlm"), folder / "student", 4, "<|mask|>", torch.float32)
    return folder / "student"


def expected(student, prompts: list[list[int]]) -> list[str]:
    """What the sampler writes."""
    model, tokenizer = load_student(str(student), "float32", "cpu")
    sampler = sampler_of(model, tokenizer, block_size=4, slots=4)
    requests = [Request(i, 0, torch.tensor(ids).numpy(), TOKENS) for i, ids in enumerate(prompts)]
    made = {t.ordinal: t for t in sampler.generate(requests, Decoding(StaticUnmasking(), temperature=0.0))}
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return [tokenizer.decode(without_end(made[i].response_ids, ends)) for i in range(len(prompts))]


def test_two_replicas_answer_like_one(student):
    prompts = [list(range(5 + i, 25 + 2 * i)) for i in range(12)]
    texts = expected(student, prompts)
    port = free_port("127.0.0.1", 0)
    address = f"http://127.0.0.1:{port}"
    options = ["--port", port, "--name", "tiny", "--api-key", KEY, "--rule", "static", "--replicas", 2, "--slots", 4]
    server = subprocess.Popen([*map(str, [sys.executable, "-m", "deploy", "serve", student, *options])])
    try:
        wait_until(lambda: answers(address), 120)
        assert httpx.post(f"{address}/v1/completions", json={}).status_code == 401

        async def ask(client: httpx.AsyncClient, ids: list[int]) -> str:
            body = {"prompt": ids, "max_tokens": TOKENS, "temperature": 0}
            reply = await client.post(f"{address}/v1/completions", json=body, headers=HEADERS)
            assert reply.status_code == 200, reply.text
            return reply.json()["choices"][0]["text"]

        async def ask_all() -> list[str]:
            async with httpx.AsyncClient(timeout=60) as client:
                return list(await asyncio.gather(*(ask(client, ids) for ids in prompts)))

        assert asyncio.run(ask_all()) == texts
        streamed = {"prompt": prompts[0], "max_tokens": TOKENS, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=streamed, headers=HEADERS) as reply:
            events = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: {")]
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == texts[0] and len(events) > 2

        one, other = replicas(server.pid)
        os.kill(one, signal.SIGKILL)
        wait_until(lambda: len(alive := set(replicas(server.pid)) - {one}) == 2 and other in alive, 60)
        wait_until(lambda: asyncio.run(ask_all()) == texts, 30)

        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 128 + signal.SIGTERM
        assert not psutil.pid_exists(other)
    finally:
        server.kill()
        server.wait()


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(true, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def replicas(server: int) -> list[int]:
    """Process ids."""
    found = psutil.Process(server).children(recursive=True)
    running = [process for process in found if process.status() != psutil.STATUS_ZOMBIE]
    return [process.pid for process in running if "ServeReplica" in " ".join(process.cmdline())]
