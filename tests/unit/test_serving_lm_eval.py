"""lm_eval's models of OpenAI's API, asked of the server."""

import json

import httpx
import pytest

from tests.unit.test_serving import MESSAGES, QUESTION, served, student  # noqa: F401

pytest.importorskip("tenacity")  # of lm_eval[api]
pytest.importorskip("lm_eval")

OPTIONS = {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}


@pytest.fixture
def of_lm_eval(served, student, monkeypatch):  # noqa: F811
    from lm_eval.models import openai_completions

    monkeypatch.setenv("OPENAI_API_KEY", "unused")

    def call(kind: str, path: str):
        options = {"model": "tiny", "tokenizer": student, "num_concurrent": 2, "max_retries": 1}
        return getattr(openai_completions, kind)(base_url=f"{served.url}/v1/{path}", **options)

    return call


def instances(*contexts):
    from lm_eval.api.instance import Instance

    return [Instance("generate_until", {}, (context, dict(OPTIONS)), i) for i, context in enumerate(contexts)]


def test_completions(served, of_lm_eval):  # noqa: F811
    texts = of_lm_eval("LocalCompletionsAPI", "completions").generate_until(instances("One and", "Two"))
    for prompt, text in zip(("One and", "Two"), texts, strict=True):
        body = {"prompt": prompt, "max_tokens": 16, "stop": OPTIONS["until"]}
        assert text == httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]


def test_chats(served, of_lm_eval):  # noqa: F811
    from lm_eval.models.api_models import JsonChatStr

    asked = instances(JsonChatStr(json.dumps(MESSAGES)))
    (text,) = of_lm_eval("LocalChatCompletion", "chat/completions").generate_until(asked)
    whole = served.post(max_tokens=16, stop=OPTIONS["until"]).json()
    assert MESSAGES[0]["content"] == QUESTION and text == whole["choices"][0]["message"]["content"]
