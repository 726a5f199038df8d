"""The server over HTTP, on a tiny random student: what clients get, and what hostile ones do not break."""

import asyncio
import json
import math
import shutil
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest
import torch
import uvicorn

from actors.evaluation.generation import load_student, sampler_of
from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from common.chat import ChatTemplate
from common.config.unmasking import DynamicUnmasking, SpeculativeUnmasking, StaticUnmasking
from common.conversion import convert_folder
from common.end_tokens import response_text
from common.prompts import prompt_ids
from common.student import attention_context
from deploy.dashboard.process import free_port
from deploy.model_checks import StudentPath
from deploy.serving import http
from deploy.serving.app import Server, create_app
from deploy.serving.asked import ChatAsk, prompter_of, read
from deploy.serving.engine import Engine
from deploy.serving.errors import ApiError
from deploy.serving.folder import StudentFolder
from deploy.serving.http import PromptHttp
from deploy.serving.jobs import Job
from deploy.serving.metrics import ServingMetrics
from tests.models import tiny_qwen3

QUESTION = "Tom has 5 apples. How many?"
MESSAGES = [{"role": "user", "content": QUESTION}]
SLOTS, QUEUE = 4, 12


def student_in(folder, **options) -> str:
    arlm = tiny_qwen3(folder / "arlm", max_length=1024)
    convert_folder(arlm, folder / "student", 4, "<|mask|>", torch.float32, **options)
    return str(folder / "student")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return student_in(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def context_causal(tmp_path_factory):
    return student_in(tmp_path_factory.mktemp("causal"), context="causal")


class Served:
    """A server in a thread of this process."""

    def __init__(self, student: str, host: str = "127.0.0.1", **options) -> None:
        model, self.tokenizer = load_student(student, "float32", "cpu")
        folder = StudentFolder(StudentPath(student), "float32", model, self.tokenizer)
        self.engine = Engine(
            model, self.tokenizer, slots=SLOTS, longest=512, queue_limit=QUEUE, metrics=ServingMetrics()
        )
        decoding = Decoding(DynamicUnmasking(), 0.0)
        prompter = prompter_of(
            self.tokenizer, {}, block_size=4, longest=512, most_tokens=24, decoding=decoding,
            verify="self" if attention_context(model.config) == "causal" else None,
        )  # fmt: skip
        self.server = Server(self.engine, prompter, "tiny", host, folder=folder, **options)
        self.port = free_port("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.port}"
        self.web = uvicorn.Server(
            uvicorn.Config(create_app(self.server), port=self.port, http=PromptHttp, log_level="error", ws="none",
                           timeout_graceful_shutdown=20)
        )  # fmt: skip
        self.thread = threading.Thread(target=self.web.run)
        self.thread.start()
        while not self.web.started:
            time.sleep(0.01)

    def end(self) -> None:
        self.web.should_exit = True
        self.thread.join()

    def post(self, path: str = "/v1/chat/completions", **body) -> httpx.Response:
        return httpx.post(self.url + path, json={"messages": MESSAGES, **body}, timeout=60)

    def idle(self) -> None:
        for _ in range(500):
            if self.engine._unfinished == 0:
                return
            time.sleep(0.01)
        raise AssertionError("slots are still in use")


@pytest.fixture(scope="module")
def served(student):
    running = Served(student)
    yield running
    running.end()


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def by_sampler(student):
    return generated_by(student)


def generated_by(student: str):
    """The response of `opdlm generate` to the question."""
    model, tokenizer = load_student(student, "float32", "cpu")

    def call(decoding, seed=0, limit=24, block_size=4, sample=0, ids=None):
        sampler: Sampler = sampler_of(model, tokenizer, block_size=block_size, slots=1, seed=seed)
        ids = prompt_ids(tokenizer, QUESTION) if ids is None else ids
        (t,) = sampler.generate([Request(0, sample, ids, limit)], decoding)
        return t, response_text(tokenizer, t.response_ids, sampler.eos_token_id)

    return call


def streamed(chunks) -> tuple[dict[int, str], list]:
    texts: dict[int, str] = {}
    chunks = list(chunks)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return texts, chunks


SETTINGS = [
    ({}, Decoding(DynamicUnmasking(), 0.0), {}),
    ({"temperature": 1, "seed": 7}, Decoding(DynamicUnmasking(), 1.0), {"seed": 7}),
    (
        {"temperature": 0.8, "seed": 3, "top_p": 0.9, "extra_body": {"top_k": 5, "rule": "static", "block_size": 8}},
        Decoding(StaticUnmasking(), 0.8, 5, 0.9),
        {"seed": 3, "block_size": 8},
    ),
    (
        {"temperature": 1, "seed": 3, "extra_body": {"threshold": 0.05}},
        Decoding(DynamicUnmasking(threshold=0.05), 1.0),
        {"seed": 3},
    ),
]


@pytest.mark.parametrize(("options", "decoding", "sampling"), SETTINGS)
def test_the_text_is_that_of_opdlm_generate_streamed_or_not(client, by_sampler, options, decoding, sampling):
    trajectory, text = by_sampler(decoding, **sampling)
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, **options)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == ("length" if trajectory.finish_reason == "length" else "stop")
    assert whole.usage.completion_tokens == len(trajectory.response_ids)
    assert whole.usage.prompt_tokens == len(trajectory.prompt_ids)
    assert whole.usage.steps == trajectory.denoise_forwards
    assert whole.usage.tokens_per_step == pytest.approx(
        len(trajectory.response_ids) / trajectory.denoise_forwards, abs=1e-4
    )
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options
    )
    texts, chunks = streamed(stream)
    assert texts == {0: text}
    assert chunks[-1].usage.model_dump() == whole.usage.model_dump()
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 1 or len(trajectory.response_ids) < 8


def test_n_choices_have_streams_of_their_own(client, by_sampler):
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, n=3, temperature=1, seed=2)
    texts = [by_sampler(Decoding(DynamicUnmasking(), 1.0), seed=2, sample=i)[1] for i in range(3)]
    assert [choice.message.content for choice in whole.choices] == texts
    assert len(set(texts)) == 3
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, n=3, temperature=1, seed=2, stream=True)
    assert streamed(stream)[0] == dict(enumerate(texts))


def test_confidence_and_the_order_of_revealing(client, by_sampler):
    options = {"temperature": 1, "seed": 7, "logprobs": True, "extra_body": {"reveal_order": True}}
    trajectory, _ = by_sampler(Decoding(DynamicUnmasking(), 1.0), seed=7)
    choice = client.chat.completions.create(model="tiny", messages=MESSAGES, **options).choices[0]
    assert [math.exp(c.logprob) for c in choice.logprobs.content] == pytest.approx(
        trajectory.confidence[: len(trajectory.response_ids)].tolist(), rel=1e-4
    )
    order = choice.reveal_order
    assert [row["round"] for row in order] == trajectory.reveal_round[: len(order)].tolist()
    first = len(trajectory.prompt_ids)
    assert [row["block"] for row in order] == [(first + i) // 4 for i in range(len(order))]
    _, chunks = streamed(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, **options))
    pieces = [row for chunk in chunks for row in getattr(chunk.choices[0], "reveal_order", None) or []]
    assert [row["round"] for row in pieces] == [row["round"] for row in order]


def test_rounds_are_streamed_as_tokens_are_unmasked(served, by_sampler):
    trajectory, text = by_sampler(Decoding(StaticUnmasking(), 0.0))
    reply = served.post(stream=True, stream_rounds=True, rule="static")
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    states = [e["choices"][0]["blocks"] for e in events if "blocks" in e["choices"][0]]
    assert len(states) > len(trajectory.response_ids) / 2
    assert any(None in s["texts"] and any(s["texts"]) for s in states)
    assert states[-1]["whole"] and "".join(states[-1]["texts"]) == text
    seen: dict[int, str] = {}
    for state in states:
        for offset, piece in enumerate(state["texts"], start=state["offset"]):
            if piece is not None:  # what is revealed stays; a part of a character is shown in the end with the whole
                assert piece.lstrip("\ufffd") == seen.setdefault(offset, piece) or "\ufffd" in seen[offset]


def test_stop_strings(client, by_sampler):
    _, text = by_sampler(Decoding(StaticUnmasking(), 1.0), seed=4, limit=40)
    stop = text[9:11]
    options = {
        "max_tokens": 40, "temperature": 1, "seed": 4, "stop": [stop, "never there"], "extra_body": {"rule": "static"},
    }  # fmt: skip
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, **options)
    assert whole.choices[0].message.content == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, **options)
    assert streamed(stream)[0] == {0: text[: text.index(stop)]}


def test_completions_of_texts_and_of_ids(client, served, by_sampler):
    ids = ChatTemplate(served.tokenizer, raw=True).ids(["One and"])[0]
    _, text = by_sampler(Decoding(DynamicUnmasking(), 0.0), ids=ids, limit=12)
    whole = client.completions.create(model="tiny", prompt=["One and", "Two and"], max_tokens=12, logprobs=1)
    assert [c.index for c in whole.choices] == [0, 1]
    assert whole.choices[0].text == text
    assert len(whole.choices[0].logprobs.tokens) == len(whole.choices[0].logprobs.token_logprobs)
    by_ids = client.completions.create(model="tiny", prompt=ids.tolist(), max_tokens=12)
    assert by_ids.choices[0].text == text
    stream = client.completions.create(model="tiny", prompt="One and", max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text


def test_models_health_and_metrics(client, served):
    assert [m.id for m in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").block_size == 4
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here; use 'tiny'"):
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    before = metric(served, "opdlm_serve_tokens_total")
    usage = client.chat.completions.create(model="tiny", messages=MESSAGES).usage
    assert metric(served, "opdlm_serve_tokens_total") == before + usage.completion_tokens
    assert metric(served, "opdlm_serve_running") == 0
    assert httpx.get(f"{served.url}/nowhere").json()["error"]["message"].startswith("GET /nowhere: Not Found")


def test_the_history_of_a_chat_is_cached_once(served, client, by_sampler):
    """The second question's prompt begins with the first one's, and with its answer."""

    def prompt_tokens() -> tuple[float, float]:
        return metric(served, "opdlm_serve_prompt_tokens_total"), metric(served, "opdlm_serve_prefix_tokens_total")

    messages = [{"role": "user", "content": "Ann has 9 pens and loses two of them on Monday. How many are left?"}]
    asked, known = prompt_tokens()
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=40)
    assert prompt_tokens() == (asked + first.usage.prompt_tokens, known)
    messages += [{"role": "assistant", "content": "7"}, {"role": "user", "content": "And then?"}]
    second = client.chat.completions.create(model="tiny", messages=messages)
    history = first.usage.prompt_tokens // 16 * 16
    assert prompt_tokens()[1] == known + history
    ids = served.server.prompter.chat_ids(read(json.dumps({"messages": messages}).encode(), ChatAsk))
    assert second.choices[0].message.content == by_sampler(Decoding(DynamicUnmasking(), 0.0), ids=ids)[1]


def metric(served, name: str) -> float:
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


REFUSED = [
    ({"tools": [{"type": "function"}]}, "tools", "not trained to call tools"),
    ({"response_format": {"type": "json_object"}}, "response_format", "no JSON mode"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "there are no penalties"),
    ({"temperature": -1}, "temperature", "temperature -1 is not accepted"),
    ({"temperature": 1e-9}, "temperature", "too close to 0"),
    ({"temperature": "hot"}, "temperature", "temperature 'hot' is not accepted"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 2}, "top_p", "less than or equal to 1"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 10**30}, "max_tokens", "do not fit into 512 tokens"),
    ({"max_tokens": True}, "max_tokens", "max_tokens True is not accepted"),
    ({"n": 10**9}, "n", "less than or equal to 128"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"threshold": 7}, "threshold", "less than or equal to 1"),
    ({"rule": "best"}, "rule", "'static', 'dynamic'"),
    (
        {"rule": "speculative"},
        "rule",
        "the original's folder as --verify; use one of static, dynamic, sequential, entropy_bound",
    ),
    ({"lower": 0.9, "threshold": 0.5, "rule": "adaptive"}, "lower", "0.9 is above threshold 0.5"),
    ({"block_size": 0}, "block_size", "greater than or equal to 1"),
    ({"stop": ["", "a"]}, "stop", "none of them empty"),
    ({"tempreature": 1}, "tempreature", "unknown field; leave it out. There are model"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "user", "content": "  "}]}, "messages", "the last one is empty"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages.0.role 'tool' is not accepted"),
    ({"messages": [{"role": "user", "content": "a <|mask|>"}]}, "messages", "holds the mask token"),
    ({"messages": [{"role": "user", "content": "long " * 2000}]}, "prompt", "shorten the prompt"),
    ({"messages": [{"role": "user", "content": "x" * 100_000}]}, "messages", "100000 characters are far more than"),
]


@pytest.mark.parametrize(("body", "field", "said"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(served, body, field, said):
    reply = served.post(**body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (400, field, "invalid_request_error")
    assert said in error["message"]


RAW = [
    (b'{"messages": [{"role": "user", "content": "caf\xe9"}]}', 400, "the body is not UTF-8"),
    (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', 400, "half a character"),
    (b'{"temperature": NaN}', 400, "NaN is no number of JSON"),
    (b'{"temperature": -Infinity}', 400, "-Infinity is no number of JSON"),
    (b'{"temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}', 400, "temperature inf is not accepted"),
    (b"{", 400, "the body is not JSON"),
    (b"[" * 100_000, 400, "the body is not JSON (nested too deep)"),
    (b"[1]", 400, "the body is [1]; send a JSON object"),
    (b"", 400, "the body is not JSON"),
    (b'{"messages": "' + b"x" * (5 << 20) + b'"}', 413, "more than 4194304 bytes"),
]


@pytest.mark.parametrize(("body", "status", "said"), RAW)
def test_bodies_that_are_broken(served, body, status, said):
    headers = {"Content-Type": "application/json"}
    reply = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert reply.status_code == status
    assert said in reply.json()["error"]["message"]


def test_a_body_without_a_length_that_never_ends(served):
    def endless():
        while True:
            yield b"x" * 65536

    headers = {"Content-Type": "application/json"}
    try:
        reply = httpx.post(f"{served.url}/v1/completions", content=endless(), headers=headers, timeout=60)
        assert reply.status_code == 413
    except httpx.WriteError:
        pass  # the connection was closed before all was sent
    served.idle()


def test_other_sites_cannot_ask(served):
    plain = httpx.post(f"{served.url}/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    assert httpx.get(f"{served.url}/health", headers={"Host": "evil.example"}).status_code == 400


def test_requests_share_passes_and_do_not_change_each_other(served, by_sampler):
    """Many at once, with different settings: each gets what it gets alone."""
    settings = [(seed, rule) for seed in range(6) for rule in ("static", "dynamic")]

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as c:
            bodies = [{"messages": MESSAGES, "temperature": 1, "seed": s, "rule": r} for s, r in settings]
            return await asyncio.gather(*(c.post(f"{served.url}/v1/chat/completions", json=b) for b in bodies))

    before = metric(served, "opdlm_serve_passes_total")
    replies = asyncio.run(all_at_once())
    texts = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    rules = {"static": StaticUnmasking(), "dynamic": DynamicUnmasking()}
    assert texts == [by_sampler(Decoding(rules[rule], 1.0), seed=seed)[1] for seed, rule in settings]
    steps = sum(reply.json()["usage"]["steps"] for reply in replies)
    assert metric(served, "opdlm_serve_passes_total") - before < steps / 2


def test_verified_text_is_that_of_opdlm_generate_while_other_rules_run(context_causal):
    """Sequences that verify run together whatever their temperature, and beside those of another rule."""
    by_sampler, served = generated_by(context_causal), Served(context_causal)
    settings = [("speculative", 0.0, 0), ("speculative", 0.8, 1), ("dynamic", 1.0, 2), ("speculative", 1.0, 3)]
    bodies = [{"messages": MESSAGES, "rule": r, "temperature": t, "seed": s, "max_tokens": 60} for r, t, s in settings]

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as c:
            return await asyncio.gather(*(c.post(f"{served.url}/v1/chat/completions", json=b) for b in bodies))

    rules = {"dynamic": DynamicUnmasking(), "speculative": SpeculativeUnmasking()}
    expected = [by_sampler(Decoding(rules[rule], t), seed=seed, limit=60) for rule, t, seed in settings]
    try:
        for _ in range(2):  # the second time in lanes that were left and made anew
            replies = [reply.json() for reply in asyncio.run(all_at_once())]
            assert [reply["choices"][0]["message"]["content"] for reply in replies] == [text for _, text in expected]
            assert [reply["usage"]["steps"] for reply in replies] == [t.denoise_forwards for t, _ in expected]
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)
        extra = {"rule": "speculative", "stream_rounds": True}
        made = client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, max_tokens=60, extra_body=extra
        )
        assert streamed(made)[0] == {0: expected[0][1]}
        history = [*MESSAGES, {"role": "assistant", "content": expected[0][1]}, {"role": "user", "content": "And now?"}]
        asked = served.post(messages=history, rule="speculative", max_tokens=30).json()["choices"][0]["message"]
        ids = served.server.prompter.chat_ids(ChatAsk(messages=history))
        assert asked["content"] == by_sampler(Decoding(SpeculativeUnmasking(), 0.0), ids=ids, limit=30)[1]
        (model,) = httpx.get(f"{served.url}/v1/models").json()["data"]
        assert model["rules"][-1] == "speculative"
    finally:
        served.end()


def test_a_full_queue_is_said_with_the_time_to_come_back(served):
    reply = served.post(n=SLOTS + QUEUE + 1)
    assert reply.status_code == 429
    assert "the queue takes 12: try again later" in reply.json()["error"]["message"]
    assert 1 <= int(reply.headers["Retry-After"]) <= 60
    served.idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots(served, stream):
    before = metric(served, "opdlm_serve_cancelled_total")
    body = json.dumps({"messages": MESSAGES, "n": 16, "max_tokens": 400, "rule": "static", "stream": stream})
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall((head + body).encode())
        while metric(served, "opdlm_serve_running") < SLOTS:
            time.sleep(0.01)
    served.idle()
    assert metric(served, "opdlm_serve_cancelled_total") == before + 16


def test_a_reader_that_takes_nothing_holds_no_slot_and_is_left(served, monkeypatch):
    monkeypatch.setattr(http, "WRITE_SECONDS", 1.0)
    body = json.dumps(
        {"messages": MESSAGES, "n": 8, "max_tokens": 128, "rule": "static", "stream": True, "stream_rounds": True}
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall((head + body).encode())
        time.sleep(0.2)
        assert served.post().status_code == 200  # others are served meanwhile
        served.idle()


def test_many_connections_that_say_nothing(served):
    connections = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(300)]
    assert served.post().status_code == 200
    for connection in connections:
        connection.close()


def test_a_connection_that_says_nothing_is_closed(served, monkeypatch):
    monkeypatch.setattr(http, "HEADER_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")
        assert connection.recv(100) == b""


def test_time_is_limited(student):
    served = Served(student, seconds=0.2)
    try:
        reply = served.post(n=16, max_tokens=400, rule="static")
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        stream = served.post(n=16, max_tokens=400, rule="static", stream=True)
        assert '"code": "timeout"' in stream.text
        served.idle()
    finally:
        served.end()


def test_an_api_key_is_needed_and_the_end_lets_requests_finish(student):
    served = Served(student, api_key="0123456789abcdef")
    try:
        assert served.post().status_code == 401
        assert httpx.get(f"{served.url}/health").status_code == 200
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="0123456789abcdef", max_retries=0)
        stream = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=96, stream=True, extra_body={"rule": "static"}
        )
        next(stream)
        served.web.should_exit = True  # what SIGTERM sets
        _, chunks = streamed(stream)
        assert chunks[-1].choices[0].finish_reason is not None
        served.thread.join(20)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/health")
    finally:
        served.end()


def converted(folder, seed: int, out, block_size: int = 4, **shape) -> str:
    arlm = tiny_qwen3(folder / f"arlm{seed}", seed, max_length=1024, **shape)
    convert_folder(arlm, out, block_size, "<|mask|>", torch.float32)
    return str(out)


@pytest.fixture
def reloading(tmp_path):
    """A server whose folder may be changed."""
    running = Served(converted(tmp_path, 0, tmp_path / "served"))
    yield running
    running.end()


def test_weights_are_swapped_while_requests_run(reloading, tmp_path):
    client = openai.OpenAI(base_url=f"{reloading.url}/v1", api_key="unused", max_retries=0)
    options = {"model": "tiny", "messages": MESSAGES, "extra_body": {"rule": "static"}}
    old = client.chat.completions.create(**options).choices[0].message.content
    other = converted(tmp_path, 1, tmp_path / "other")
    streams = [client.chat.completions.create(**options, max_tokens=400, stream=True, seed=i) for i in range(6)]
    for stream in streams[:4]:  # two wait for a slot
        next(stream)
    shutil.rmtree(tmp_path / "served")
    shutil.copytree(other, tmp_path / "served")
    assert httpx.post(f"{reloading.url}/admin/reload", json={}, timeout=60).json() == {"weights_version": 1}
    assert metric(reloading, "opdlm_serve_running") + metric(reloading, "opdlm_serve_waiting") > 0
    for stream in streams:
        _, chunks = streamed(stream)
        assert chunks[-1].choices[0].finish_reason is not None
    reloading.idle()
    assert metric(reloading, "opdlm_serve_cancelled_total") == 0
    assert metric(reloading, "opdlm_serve_weights_version") == 1
    new = client.chat.completions.create(**options).choices[0].message.content
    model, tokenizer = load_student(other, "float32", "cpu")
    asked = [Request(0, 0, prompt_ids(tokenizer, QUESTION), 24)]
    (t,) = sampler_of(model, tokenizer, block_size=4, slots=1).generate(asked, Decoding(StaticUnmasking(), 0.0))
    assert new == response_text(tokenizer, t.response_ids, model.generation_config.eos_token_id)
    assert new != old


def test_weights_are_swapped_while_nothing_runs(reloading):
    first = [reloading.post(block_size=size).json()["choices"][0]["message"]["content"] for size in (4, 8)]
    for version in (1, 2):
        reply = httpx.post(f"{reloading.url}/admin/reload", json={}, timeout=60)
        assert reply.json() == {"weights_version": version}
    assert httpx.get(f"{reloading.url}/health").status_code == 200
    again = [reloading.post(block_size=size).json()["choices"][0]["message"]["content"] for size in (4, 8)]
    assert again == first


def test_another_model_is_not_swapped_in(reloading, tmp_path):
    text = reloading.post().json()["choices"][0]["message"]["content"]

    def answer(**options) -> tuple[int, str]:
        reply = httpx.post(f"{reloading.url}/admin/reload", timeout=60, **options)
        return reply.status_code, reply.json()["error"]["message"]

    shutil.rmtree(tmp_path / "served")
    status, said = answer(json={})
    assert status == 409 and "does not exist" in said and said.endswith("the old weights are served on")
    converted(tmp_path, 2, tmp_path / "served", block_size=8, layers=3)
    status, said = answer(json={})
    assert status == 409
    assert "differs from the model that is served in block_size" in said
    assert "num_hidden_layers" in said and "start a new server; the old weights" in said
    assert answer(content=b"{}")[0] == 415  # as another site's page would send it
    assert answer(json={"model": "x"}) == (400, 'the body is b\'{"model":"x"}\'; a reload takes no fields, so send {}')
    assert reloading.post().json()["choices"][0]["message"]["content"] == text


def test_only_who_has_the_key_reloads(student):
    for host, key, without in (("127.0.0.1", "0123456789abcdef", 401), ("0.0.0.0", None, 403)):
        served = Served(student, host, api_key=key)
        try:
            assert httpx.post(f"{served.url}/admin/reload", json={}).status_code == without
            headers = {"Authorization": f"Bearer {key}"}
            status = httpx.post(f"{served.url}/admin/reload", json={}, headers=headers, timeout=60).status_code
            assert status == (200 if key else 403)
        finally:
            served.end()


def test_weights_that_come_when_the_engine_has_ended_are_refused(student):
    served = Served(student)
    served.end()
    with pytest.raises(ApiError, match="the engine has ended"):
        served.server.folder.reload(served.engine)


def test_a_broken_model_fails_its_requests_and_the_engine_goes_on(student):
    served = Served(student)
    try:
        weight = served.engine.model.model.norm.weight
        kept = weight.detach().clone()
        weight.fill_(torch.nan)
        reply = served.post()
        assert reply.status_code == 500
        assert "non-finite logits" in reply.json()["error"]["message"]
        weight.copy_(kept)
        assert served.post().status_code == 200
        served.idle()
    finally:
        served.end()


def test_an_engine_that_ends_leaves_nobody_waiting(student, monkeypatch):
    served = Served(student)
    try:
        monkeypatch.setattr(Sampler, "finished_blocks", lambda *_: 1 / 0)
        reply = served.post()
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "generation_failed")
        assert httpx.get(f"{served.url}/health").status_code == 503
        assert served.post().status_code == 503
    finally:
        served.end()


def test_a_job_that_is_cancelled_in_the_queue_never_runs(student):
    model, tokenizer = load_student(student, "float32", "cpu")
    engine = Engine(model, tokenizer, slots=1, longest=512, queue_limit=1, metrics=ServingMetrics())

    async def main() -> tuple[Job, Job]:
        engine.start()
        event = asyncio.Event()
        first, second = (Job(Request(i, 0, np.arange(9), 64), 4, event) for i in range(2))
        engine.submit([first, second])
        with pytest.raises(ApiError):
            engine.submit([Job(Request(2, 0, np.arange(9), 64), 4, event)])
        engine.cancel([second])
        while not first.ended:
            await event.wait()
            event.clear()
        await asyncio.to_thread(engine.close)
        return first, second

    first, second = asyncio.run(main())
    assert first.trajectory is not None and not second.ended


COMMANDS = [
    (("--rule", "speculative"), "--rule: 'speculative' needs a student with attention_context 'causal'"),
    (("--host", "0.0.0.0"), "--host: '0.0.0.0' can be reached from other machines, so an API key is required"),
    (("--api-key", "short"), "--api-key: it has 5 characters; make a longer one"),
    (("--api-key-file", "nowhere.txt"), "--api-key-file: 'nowhere.txt' does not exist"),
    (("--max-length", "100000"), "--max-length: 100000 is more than the model's 1024 positions; use 1024"),
]


@pytest.mark.parametrize(("options", "said"), COMMANDS)
def test_the_command_refuses_what_it_cannot_serve(opdlm, student, options, said):
    status, _, err = opdlm("serve", student, *options)
    assert status == 2
    assert said in err
