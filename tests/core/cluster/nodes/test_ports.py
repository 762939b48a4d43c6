"""The ports of a run: offsets, limits, and who listens where."""

import pytest

from core.cluster.nodes.ports import Listener, Ports, listeners, node_of, table
from core.errors import ConfigError
from core.parallel.plan import Plan
from core.settings.address import join_address, split_address

# 16 ranks, 8 attention groups of 2, over experts of one rank each.
DP8 = Plan(dp=8, tp_attn=2, ep=16)
TP16 = Plan(tp_attn=16, ep=16)


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("10.0.0.1:20000", "10.0.0.1", 20000),
        ("node-0.cluster:1", "node-0.cluster", 1),
        ("[fd00::1]:65535", "fd00::1", 65535),
        ("[fe80::1%eth0]:20000", "fe80::1%eth0", 20000),
    ],
)
def test_an_address_is_read_and_written(address, host, port):
    assert split_address(address) == (host, port)
    assert join_address(host, port) == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "node0",
        ":20000",
        "[]:20000",
        "node0:",
        "node0:x",
        "node0:²",
        "node0:٣",
        "fd00::1:20000",
        "[node0]:20000",
        "[fd00::1:20000",
        "tcp://node0:20000",
        "me@node0:20000",
        "node 0:20000",
        "node0:200000",
        "node0:-1",
    ],
)
def test_what_is_no_address_is_refused_with_the_key_and_examples(address):
    with pytest.raises(ConfigError) as caught:
        split_address(address)
    assert str(caught.value).startswith(f"launch.dist_init_addr={address!r}: expected HOST:PORT")
    assert "10.0.0.1:20000" in str(caught.value)


@pytest.mark.parametrize("address", ["node0:0", "node0:65536"])
def test_a_port_out_of_range_is_refused(address):
    with pytest.raises(ConfigError, match=r"x='node0:\d+': allowed ports: 1 to 65535"):
        split_address(address, "x")


def test_every_port_has_a_fixed_offset():
    ports = Ports.of("10.0.0.1:20000", DP8)
    assert (ports.control, ports.store, ports.engine, ports.lockstep) == (
        20000,
        20001,
        20002,
        20003,
    )
    assert [ports.plan(dp_rank) for dp_rank in range(8)] == list(range(20016, 20024))
    assert ports.highest == 20023


def test_the_highest_port_is_one_there_is():
    assert Ports(65535 - 23, 8).highest == 65535
    with pytest.raises(ConfigError, match=r"port 65513.*8 DP ranks.*23 above.*1 to 65512"):
        Ports(65535 - 22, 8)
    with pytest.raises(ConfigError, match="has port 0"):
        Ports(0, 1)


def test_neighbouring_ranks_are_on_one_node():
    assert [node_of(rank, TP16, 2) for rank in (0, 7, 8, 15)] == [0, 0, 1, 1]
    assert {node_of(rank, TP16, 1) for rank in range(16)} == {0}


def test_listeners_of_one_attention_group_over_two_nodes():
    assert listeners(Ports(100, 1), TP16, 2) == [
        Listener("control", 100, 0, "the parent of every other node", (1,)),
        Listener("store", 101, 0, "every rank", (0, 1)),
        Listener("engine", 102, 0, "the leader of every DP rank", (0,)),
        Listener("plans of DP rank 0", 116, 0, "ranks 1-15", (0, 1)),
    ]


def test_listeners_of_dp_attention_over_two_nodes():
    found = {listener.name: listener for listener in listeners(Ports(100, 8), DP8, 2)}
    assert found["engine"].client_nodes == (0, 1)
    assert found["lockstep"] == Listener("lockstep", 103, 0, "the leaders of DP ranks 1-7", (0, 1))
    assert found["plans of DP rank 3"] == Listener("plans of DP rank 3", 119, 0, "rank 7", (0,))
    assert found["plans of DP rank 4"] == Listener("plans of DP rank 4", 120, 1, "rank 9", (1,))
    crossing = {name for name, listener in found.items() if listener.crosses_nodes}
    assert crossing == {"control", "store", "engine", "lockstep"}


def test_a_rank_alone_in_its_group_listens_to_no_plans():
    plan = Plan(dp=4, tp_attn=1, ep=4)
    names = [listener.name for listener in listeners(Ports(100, 4), plan, 4)]
    assert names == ["control", "store", "engine", "lockstep"]


def test_all_ports_of_a_run_differ_and_lie_between_base_and_highest():
    for plan in (TP16, DP8, Plan(dp=16, tp_attn=2, tp_expert=32)):
        ports = Ports(20000, plan.dp)
        used = [listener.port for listener in listeners(ports, plan, 2)]
        assert len(set(used)) == len(used)
        assert used == sorted(used)
        assert used[0] == ports.base
        assert used[-1] <= ports.highest


def test_the_table_is_readable():
    assert table(Ports(20000, 1), TP16, 2).splitlines() == [
        "port   on node  for                 connected to by",
        "20000  0        control             the parent of every other node",
        "20001  0        store               every rank",
        "20002  0        engine              the leader of every DP rank",
        "20016  0        plans of DP rank 0  ranks 1-15",
    ]
