"""Addresses, interfaces and ports of this machine."""

import os
import socket

import psutil
import pytest

from core.cluster.nodes import network
from core.cluster.nodes.network import (
    interface_environment,
    interface_of,
    interface_text,
    listen,
    own_address,
    require_free,
)
from core.errors import ConfigError, ResourceError


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two networks."""

    def entry(address: str) -> object:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return type("Entry", (), {"family": family, "address": address})()

    found = {
        "lo": [entry("127.0.0.1")],
        "eth0": [entry("10.0.0.1"), entry("fe80::1%eth0")],
        "ib0": [entry("192.168.7.1"), entry("fd00::7")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    monkeypatch.setattr(
        network.socket,
        "getaddrinfo",
        lambda host, port, **_: [(0, 0, 0, "", (address, 0)) for address in addresses],
    )


@pytest.mark.usefixtures("interfaces")
def test_the_interface_of_an_address() -> None:
    assert interface_of("192.168.7.1") == "ib0"
    assert interface_of("fd00::7") == "ib0"
    assert interface_of("fe80::1%eth0") == "eth0"
    assert interface_of("127.0.0.2") == "lo"
    assert interface_of("10.9.9.9") is None


@pytest.mark.usefixtures("interfaces")
def test_collectives_stay_on_it_unless_the_user_says_otherwise() -> None:
    assert interface_environment("10.0.0.1", {}) == {
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
    }
    own = {"NCCL_SOCKET_IFNAME": "ib0"}
    assert interface_environment("10.0.0.1", own) == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert interface_environment("10.9.9.9", {}) == {}
    assert interface_text("10.0.0.1", {}) == "interface eth0 (10.0.0.1)"
    assert interface_text("10.0.0.1", own) == (
        "interface eth0 (10.0.0.1); set in the environment: NCCL_SOCKET_IFNAME=ib0"
    )


@pytest.mark.usefixtures("interfaces")
def test_node_0_finds_its_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "10.7.7.7", "192.168.7.1")
    assert own_address("node0") == "192.168.7.1"


@pytest.mark.usefixtures("interfaces")
def test_an_address_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "10.7.7.7")
    with pytest.raises(ConfigError) as caught:
        own_address("node0")
    text = str(caught.value)
    assert "node 0 listens at node0 (10.7.7.7), and that is no address of this machine" in text
    assert "has 10.0.0.1, fe80::1, 192.168.7.1, fd00::7" in text
    assert "launch.node_rank=0" in text


@pytest.mark.usefixtures("interfaces")
def test_a_name_that_means_loopback_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "127.0.1.1")
    with pytest.raises(ConfigError, match=r"the name 'node0' means 127\.0\.1\.1"):
        own_address("node0")
    assert own_address("127.0.1.1") == "127.0.1.1"
    assert own_address("localhost") == "127.0.1.1"


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"launch\.dist_init_addr: the host 'nowhere\.invalid'"):
        own_address("nowhere.invalid")


def test_a_taken_port_is_named_with_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError) as caught:
            listen("127.0.0.1", port, "the other nodes")
        text = str(caught.value)
        assert f"can't listen at 127.0.0.1:{port} for the other nodes: Address already in" in text
        assert f"(pid {os.getpid()}: " in text
        with pytest.raises(ResourceError, match=f"127.0.0.1:{port} for the port of store"):
            require_free("127.0.0.1", [("the port of store", port)])
    require_free("127.0.0.1", [("the port of store", port)])


def test_it_listens_on_that_address_alone() -> None:
    with listen("127.0.0.1", 0, "the other nodes") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("chosen", "said"), [("lo", "no other node can reach"), ("none0", "is no interface")]
)
def test_an_interface_that_would_only_hang_is_refused(chosen: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        interface_environment("192.0.2.1", {"GLOO_SOCKET_IFNAME": chosen})
    assert f"GLOO_SOCKET_IFNAME={chosen}" in str(caught.value)
    assert "GLOO_SOCKET_IFNAME" not in interface_environment(
        "127.0.0.1", {"GLOO_SOCKET_IFNAME": "lo"}
    )
