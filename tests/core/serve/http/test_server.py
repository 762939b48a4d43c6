"""Binding and the limits on headers, over raw sockets."""

import asyncio
import os
import socket
import subprocess
import sys
import threading

import pytest

from core.errors import ConfigError, ResourceError
from core.interfaces.http import HttpStats
from core.serve.http import server as http_server
from core.serve.http.limits import (
    MOST_CONNECTIONS,
    SPARE_DESCRIPTORS,
    HttpLimits,
    settle_connections,
)
from core.serve.http.server import Server, bind, is_loopback, url_of

LIMITS = HttpLimits(head_s=0.5, idle_s=0.5)


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
def address():
    listener = bind("127.0.0.1", 0)
    started = threading.Event()
    server = Server(
        application,
        limits=LIMITS,
        stats=HttpStats(),
        on_end=lambda record: None,
        on_started=started.set,
    )
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


def test_large_headers(address):
    answer = exchange(address, b"GET / HTTP/1.1\r\nA: " + b"x" * (4 * LIMITS.max_head_bytes))
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert len(answer) < 4096
    assert b"got" not in answer


def test_headers_just_within_the_limit(address):
    size = LIMITS.max_head_bytes - 100
    request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nA: " + b"x" * size
    assert b"got 0" in exchange(address, request + b"\r\n\r\n")


def test_headers_that_never_end_time_out(address):
    assert exchange(address, b"GET / HT").startswith(b"HTTP/1.1 408 ")


def test_an_answer_is_read_whole_though_the_client_still_sends(address):
    """The kernel drops an answer that was not read yet where a socket is closed on unread data."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(b"no request\r\n\r\n" + b"x" * 1_000_000)
        assert b"HTTP/1.1 400 " in receive(connection)


def test_a_second_request_has_its_own_deadline(address):
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        receive(connection, b"got 0")
        connection.sendall(b"GET / HTTP/1.1\r\nHo")
        assert b"HTTP/1.1 408 " in receive(connection)


def test_accepted_sockets_are_probed_while_nothing_is_sent(address):
    with bind("127.0.0.1", 0) as listener:
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
        with accepted:
            for level, option, value in http_server.KEEP_ALIVE:
                assert accepted.getsockopt(level, option) == value


def test_descriptors_are_raised_and_compared_with_what_is_needed():
    code = (
        "import resource; from core.cluster.processes.machine import raise_descriptor_limit;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512));"
        "assert raise_descriptor_limit() == 512;"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (512, 512)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert settle_connections(None, 512) == 512 - SPARE_DESCRIPTORS
    assert settle_connections(None, 10**6) == MOST_CONNECTIONS
    assert settle_connections(100, 512) == 100
    with pytest.raises(ResourceError, match=r"frontend\.max_connections to 384"):
        settle_connections(385, 512)
    with pytest.raises(ResourceError, match="ulimit -Hn"):
        settle_connections(None, 64)
