"""Binding and the limits on headers, over raw sockets."""

import asyncio
import os
import socket
import threading

import pytest

from core.errors import ConfigError, ResourceError
from core.serve import http_server
from core.serve.http_server import MAX_HEADER_BYTES, Server, bind, is_loopback, url_of


async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"got %d" % len(body)})


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(http_server, "HEADER_DEADLINE_S", 0.5)
    listener = bind("127.0.0.1", 0)
    started = threading.Event()
    server = Server(application, keep_alive_s=0.5, on_started=started.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    found = listener.getsockname()
    thread.start()
    assert started.wait(10)
    yield found
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def exchange(address, data):
    """Everything the server says to `data` until it closes the connection."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(data)
        return receive(connection)


def receive(connection, until=None):
    """What the server says up to `until`, or until it closes the connection."""
    answer = b""
    while until is None or until not in answer:
        chunk = connection.recv(65536)
        if not chunk:
            assert until is None, answer
            break
        answer += chunk
    return answer


def test_port_zero_takes_a_free_one():
    with bind("127.0.0.1", 0) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
    with bind("::1", 0) as listener:
        assert url_of(listener).startswith("http://[::1]:")


def test_a_port_in_use_is_named_with_its_owner():
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ResourceError) as caught:
            bind("127.0.0.1", port)
    assert f"frontend.port={port} on 127.0.0.1 is in use" in str(caught.value)
    assert f"by pid {os.getpid()}" in str(caught.value)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_hosts_that_are_not_ours(host):
    with pytest.raises(ConfigError, match=r"frontend\.host"):
        bind(host, 0)


def test_loopback():
    assert all(is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"))


def test_ordinary_requests_and_keep_alive(address):
    request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    answer = exchange(address, request + request)
    assert answer.count(b"got 5") == 2, "and the idle connection was closed in the end"
    large = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000
    assert b"got 100000" in exchange(address, large), "a body is not counted as headers"


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nA: " + b"x" * (MAX_HEADER_BYTES + 1) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * (MAX_HEADER_BYTES // 6 + 1) + b"\r\n",
        b"GET /" + b"x" * (MAX_HEADER_BYTES + 1) + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"x" * (4 * MAX_HEADER_BYTES),  # and no end
    ],
)
def test_large_headers(address, head):
    answer = exchange(address, head)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert len(answer) < 4096
    assert b"got" not in answer


def test_headers_just_within_the_limit(address):
    request = b"GET / HTTP/1.1\r\nConnection: close\r\nA: " + b"x" * (MAX_HEADER_BYTES - 100)
    assert b"got 0" in exchange(address, request + b"\r\n\r\n")


@pytest.mark.parametrize("data", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nA: b\r\n"])
def test_headers_that_never_end_time_out(address, data):
    assert exchange(address, data).startswith(b"HTTP/1.1 408 ")


def test_a_second_request_has_its_own_deadline(address):
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        receive(connection, b"got 0")
        connection.sendall(b"GET / HTTP/1.1\r\nHo")
        assert b"HTTP/1.1 408 " in receive(connection)


def test_garbage_is_refused(address):
    assert exchange(address, b"\x16\x03\x01 tls hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    smuggled = b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!"
    assert exchange(address, smuggled).startswith(b"HTTP/1.1 400 ")


def test_conflicting_framing_is_refused(address):
    both = (
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\n"
    )
    assert exchange(address, both).startswith(b"HTTP/1.1 400 ")


def test_an_answer_under_way_is_not_cut_by_what_follows_it(address, monkeypatch):
    """A second request that never ends, pipelined behind one whose body is still read."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab")
        connection.sendall(b"GET / HTTP/1.1\r\nA: " + b"x" * (2 * MAX_HEADER_BYTES))
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert answer.count(b"HTTP/1.1 200") == 1
    assert answer.endswith(b"}") or answer.endswith(b"got 2") or answer.endswith(b"0\r\n\r\n")
