"""One HTTP stack for all tests of a module that don't break it."""

import httpx
import openai
import pytest

from tests.support.http_stack import Stack


@pytest.fixture(scope="module")
def shared_stack():
    with Stack() as stack:
        yield stack


@pytest.fixture
def stack(shared_stack):
    shared_stack.reset()
    yield shared_stack
    shared_stack.engine.stepping.set()
    shared_stack.engine.wait_for(lambda: not shared_stack.engine.live)


@pytest.fixture
def client(stack):
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(stack):
    with httpx.Client(base_url=stack.url, timeout=20) as http:
        yield http
