"""Clients that people use, against a real server: openai (in test_server), llm and litellm."""

from collections.abc import Iterator

import litellm
import pytest
from llm.default_plugins.openai_models import Chat

from tests.support.server import Server, running_server

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("+model=smollm2") as running:
        yield running
        assert running.stop() == 0


def test_litellm(server: Server) -> None:
    common = {
        "model": "openai/smollm2",
        "api_base": f"{server.url}/v1",
        "api_key": "none",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 16,
    }
    whole = litellm.completion(**common)
    assert "Paris" in whole.choices[0].message.content
    parts = litellm.completion(**common, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content


def test_llm(server: Server) -> None:
    model = Chat("smollm2", model_name="smollm2", api_base=f"{server.url}/v1")
    model.key = "none"
    whole = model.prompt(QUESTION, stream=False, temperature=0, max_tokens=16).text()
    assert "Paris" in whole
    assert "".join(model.prompt(QUESTION, temperature=0, max_tokens=16)) == whole
