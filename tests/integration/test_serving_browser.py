"""The chat in a real browser: text appears as it is unmasked; nothing is asked of other machines."""

import json
import signal
import subprocess
import sys
import time

import httpx
import pytest
import torch

from common.conversion import convert_folder
from deploy.dashboard.process import free_port
from tests.browser import chromium, needs_chromium
from tests.chat_picture import take
from tests.models import tiny_qwen3

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(240),
    needs_chromium,
]
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    convert_folder(tiny_qwen3(folder / "arlm"), folder / "student", 4, "<|mask|>", torch.float32, context="causal")
    port = free_port("127.0.0.1", 0)
    command = [sys.executable, "-m", "deploy", "serve", folder / "student", "--compare", folder / "arlm"]
    options = ["--port", port, "--name", "tiny", "--api-key", KEY, "--max-tokens", 64]
    server = subprocess.Popen([*map(str, command), *map(str, options)])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield address
        headers = {"Authorization": f"Bearer {KEY}"}
        server.send_signal(signal.SIGHUP)
        for _ in range(100):
            (model,) = httpx.get(f"{address}/v1/models", headers=headers).json()["data"]
            if model["weights_version"] == 1:
                break
            time.sleep(0.1)
        assert model["weights_version"] == 1, "SIGHUP reads the weights again"
        assert httpx.get(f"{address}/health").status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 128 + signal.SIGTERM or server.returncode in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def test_a_chat(url, browser):
    expect = playwright.expect
    page = browser.new_page(viewport={"width": 1200, "height": 800}, color_scheme="light")
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    expect(page.locator("#key")).to_be_visible()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.locator("#key").fill(KEY)
    page.locator("#key").press("Tab")
    expect(page.locator("#name")).to_have_text("tiny")
    expect(page.locator("#key")).to_be_hidden()
    expect(page.locator("#block-value")).to_have_text("4")
    expect(page.locator("#threshold-value")).to_have_text("0.90")
    page.locator("#threshold").fill("0.995")
    expect(page.locator("#threshold-value")).to_have_text("0.995")
    page.locator("#threshold").fill("0.9")
    expect(page.locator("#rule")).to_have_value("dynamic")

    # what was seen at every change: masked positions that become text
    page.evaluate("""() => {
      window.seen = [];
      new MutationObserver(() => seen.push(document.querySelectorAll('.response .masked').length)).observe(
        document.getElementById('chat'), { subtree: true, childList: true });
    }""")
    question = "<b>Tom</b> has 5 apples. How many?"
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")
    expect(page.locator(".question")).to_have_text(question)
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.locator(".stats").first).to_contain_text("per step", timeout=60_000)
    expect(page.locator(".stats").last).to_contain_text("1.00 per step", timeout=60_000)
    expect(page.locator("#send")).to_have_text("Send")
    assert max(page.evaluate("seen")) > 0
    expect(page.locator(".response .masked")).to_have_count(0)

    body = {"messages": [{"role": "user", "content": question}], "threshold": 0.9, "reveal_order": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    (choice,) = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60).json()["choices"]
    shown = page.locator(".response").first.evaluate("(e) => e.textContent")
    assert shown.replace("\ufffd", "") == choice["message"]["content"].replace("\ufffd", "")
    rounds = page.locator(".response").first.evaluate("(e) => [...e.children].map((t) => t.title)")
    assert rounds == [f"round {row['round']}" for row in choice["reveal_order"]]

    # other settings reach the engine; the chat goes on
    page.locator("#block").fill("3")
    expect(page.locator("#block-value")).to_have_text("8")
    asked = []
    page.on("request", lambda request: asked.append(request.post_data) if request.method == "POST" else None)
    page.locator("#threshold").fill("0.3")
    page.locator("#question").fill("And now?")
    page.locator("#send").click()
    expect(page.locator(".stats")).to_have_count(4)
    expect(page.locator(".stats").nth(2)).to_contain_text("per step", timeout=60_000)
    sent = json.loads(asked[0])
    assert (sent["rule"], sent["block_size"], sent["threshold"]) == ("dynamic", 8, 0.3)
    assert [m["role"] for m in sent["messages"]] == ["user", "assistant", "user"]

    # verified decoding writes what one token at a time would
    page.locator("#new").click()
    page.locator("#rule").select_option("speculative")
    expect(page.locator("#threshold")).to_be_disabled()
    page.locator("#block").fill("0")
    page.locator("#question").fill(question)
    page.locator("#send").click()
    expect(page.locator(".stats").first).to_contain_text("per step", timeout=60_000)
    one_by_one = page.locator(".response").first.text_content()
    page.locator("#new").click()
    page.locator("#block").fill("3")
    page.locator("#question").fill(question)
    page.locator("#send").click()
    expect(page.locator(".stats").first).to_contain_text("per step", timeout=60_000)
    assert page.locator(".response").first.text_content() == one_by_one
    assert json.loads(asked[-1])["messages"][0]["content"] == question

    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.locator("#new").click()
    expect(page.locator("#welcome")).to_be_visible()
    assert errors == []
    assert [request for request in requests if not request.startswith(f"{url}/")] == []
    page.close()


def test_a_phone(url, browser):
    expect = playwright.expect
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(url)
    page.evaluate(f"sessionStorage.setItem('opdlm-key', '{KEY}')")
    page.reload()
    expect(page.locator("#name")).to_have_text("tiny")
    page.locator("#question").fill("x" * 200)
    page.locator("#send").click()
    expect(page.locator(".stats").first).to_contain_text("per step", timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_a_picture_for_the_documentation_shows_an_answer_that_is_unmasked(url, browser, tmp_path):
    page = browser.new_page(color_scheme="light")
    take(page, url, tmp_path / "chat.png", ["Tom has 5 apples.", "How many?"], events=8, key=KEY)
    assert page.locator(".response").nth(2).locator(".masked").count() > 0
    assert page.locator(".response").nth(0).locator(".masked").count() == 0
    assert (tmp_path / "chat.png").read_bytes().startswith(b"\x89PNG")
    page.close()
