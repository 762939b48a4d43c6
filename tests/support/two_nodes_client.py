"""A client of node 0 of two nodes, and the seconds that tests of them measure and allow."""

import http.client
import json
from collections.abc import Callable
from typing import Any

from tests.support.two_nodes import Network

HTTP_PORT = 30000
KNOWN_S = 5.0  # in which a difference between nodes is known everywhere
ENDED_S = 2.0  # in which everything ends after a death or a cut
SLACK_S = 1.0  # more on a machine that is busy with other tests


def report(fault: str, seconds: list[float]) -> None:
    print(f"\nMEASURED {fault}: {', '.join(f'{value:.2f} s' for value in seconds)}")


def post(path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    """To node 0's frontend, from its namespace."""
    connection = http.client.HTTPConnection("127.0.0.1", HTTP_PORT, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def answer(path: str, body: dict[str, Any]) -> Any:
    response = post(path, body)
    value = json.loads(response.read())
    assert response.status == 200, value
    return value


def stream_until_end(network: Network, on_first: Callable[[], float]) -> tuple[float, list[str]]:
    """What `on_first` returned, which is called when a long stream's first line came; and the
    lines after that."""

    def read() -> tuple[float, list[str]]:
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 500, "stream": True}
        response = post("/v1/completions", body | {"ignore_eos": True})
        assert response.status == 200, response.read()
        response.readline()
        begin_s = on_first()
        return begin_s, [line.decode() for line in response if line.strip()]

    return network.inside(0, read)
