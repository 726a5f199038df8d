"""Servers behind one port: the answers of one, also while one of them is replaced; and the application of a config file
of Ray Serve, which starts another one where there is much to do."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import yaml

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


PROMPTS = [list(range(5 + i, 25 + 2 * i)) for i in range(12)]


@pytest.fixture(scope="module")
def texts(student):
    return expected(student, PROMPTS)


@pytest.fixture(scope="module")
def server(student):
    """The process of `opdlm serve --replicas 2` and its address."""
    port = free_port("127.0.0.1", 0)
    options = ["--port", port, "--name", "tiny", "--api-key", KEY, "--rule", "static", "--replicas", 2, "--slots", 4]
    process = subprocess.Popen([*map(str, [sys.executable, "-m", "deploy", "serve", student, *options])])
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(address), 120)
        yield process, address
    finally:
        process.kill()
        process.wait()


def ask_all(address: str, prompts: list[list[int]], tokens: int = TOKENS) -> list[str]:
    async def ask(client: httpx.AsyncClient, ids: list[int]) -> str:
        body = {"prompt": ids, "max_tokens": tokens, "temperature": 0}
        reply = await client.post(f"{address}/v1/completions", json=body, headers=HEADERS)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["text"]

    async def ask_together() -> list[str]:
        async with httpx.AsyncClient(timeout=60) as client:
            return list(await asyncio.gather(*(ask(client, ids) for ids in prompts)))

    return asyncio.run(ask_together())


def test_two_replicas_answer_like_one(server, texts):
    process, address = server
    assert httpx.post(f"{address}/v1/completions", json={}).status_code == 401
    assert ask_all(address, PROMPTS) == texts
    streamed = {"prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=streamed, headers=HEADERS) as reply:
        events = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: {")]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == texts[0] and len(events) > 2

    one, other = replicas(process.pid)
    os.kill(one, signal.SIGKILL)
    wait_until(lambda: len(alive := set(replicas(process.pid)) - {one}) == 2 and other in alive, 60)
    wait_until(lambda: ask_all(address, PROMPTS) == texts, 30)


def test_the_application_of_a_config_file_grows_with_the_requests(server, student, texts, tmp_path):
    """As KubeRay hands a config to Ray Serve: on a Serve that runs, here that of the command."""
    process, address = server
    scaling = {"target_ongoing_requests": 2, "upscale_delay_s": 0.5, "look_back_period_s": 1}
    config = {
        "http_options": {"host": "127.0.0.1", "port": int(address.rpartition(":")[2])},
        "applications": [
            {
                "name": "opdlm",
                "route_prefix": "/",
                "import_path": "deploy.commands.serve:application",
                "args": {
                    "model": str(student), "name": "grown", "api_key": KEY, "rule": "static", "slots": 4,
                    "replicas": "1:2",
                },
                "deployments": [
                    {"name": "opdlm", "autoscaling_config": {"min_replicas": 1, "max_replicas": 2} | scaling}
                ],
            }
        ],
    }  # fmt: skip
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    before = set(replicas(process.pid))
    program, log = Path(sys.executable).parent / "serve", (tmp_path / "log").open("w")
    command = [program, "run", "--address", ray_of(process.pid), tmp_path / "serve.yaml"]
    deployed = subprocess.Popen([*map(str, command)], stdout=log, stderr=log)
    try:
        wait_until(lambda: served(address) == "grown" and not before & set(replicas(process.pid)), 90)
        assert len(replicas(process.pid)) == 1
        assert ask_all(address, PROMPTS) == texts
        end = time.monotonic() + 60
        while len(replicas(process.pid)) < 2:
            assert time.monotonic() < end
            ask_all(address, 2 * PROMPTS, tokens=300)
        assert ask_all(address, PROMPTS) == texts
    finally:
        deployed.kill()
        deployed.wait()


def test_all_end_on_a_signal(server):
    process, _ = server
    before = replicas(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert before and not any(map(psutil.pid_exists, before))


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def served(address: str) -> str | None:
    """The model's name; None: nobody answers just now."""
    reply = httpx.get(f"{address}/v1/models", headers=HEADERS)
    return reply.json()["data"][0]["id"] if reply.status_code == 200 else None


def ray_of(server: int) -> str:
    """The address of the Ray that a server started."""
    words = [word for process in psutil.Process(server).children(recursive=True) for word in process.cmdline()]
    return next(word for word in words if word.startswith("--gcs-address=")).partition("=")[2]


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
