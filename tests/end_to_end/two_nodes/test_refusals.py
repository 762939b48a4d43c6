"""Two nodes that don't fit each other: the difference is known on both, and nothing is started."""

import os
import re
import secrets
import shutil
import socket
import time
from pathlib import Path

import pytest

from tests.support.models import write_tiny_model
from tests.support.two_nodes import ADDRESSES, BASE_PORT, Network, Nodes, running_nodes, why_not
from tests.support.two_nodes_client import KNOWN_S, SLACK_S, report

REASON = why_not()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.timeout(240),
]
DIFFER = "the nodes differ, so nothing was started"


def expect_refusal(nodes: Nodes, *fragments: str, fault: str) -> None:
    """Both nodes end with an error that holds all fragments, soon after the second came."""
    begin_s = time.monotonic()
    seconds = nodes.end_seconds(begin_s)
    report(fault, seconds)
    for node in nodes.nodes:
        assert node.process.returncode == 2, node.text
        assert "Traceback" not in node.text
        errors = node.text[node.text.index("error:") :]
        for fragment in fragments:
            assert re.search(fragment, errors), node.text
    assert max(seconds) < KNOWN_S + SLACK_S, seconds


def test_another_configuration(network: Network, words: list[str], token: str) -> None:
    with running_nodes(
        network, *words, token=token, extra=(["engine.page_size=16"], ["engine.page_size=32"])
    ) as nodes:
        expect_refusal(
            nodes,
            DIFFER,
            "engine.page_size: node 0 has 16; node 1 has 32",
            "change node 1",
            fault="other config",
        )


def test_another_plugin_version(
    network: Network, words: list[str], token: str, tmp_path: Path
) -> None:
    """A third party's plugin, installed in two versions."""
    paths = []
    for version in ("1.0", "1.1"):
        site = tmp_path / version
        info = site / f"acme_nodeweave-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: acme-nodeweave\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text("[nodeweave]\nacme = acme_nodeweave\n")
        (site / "acme_nodeweave.py").write_text(
            "from core.plugin.hookspecs import hookimpl\n\n"
            "@hookimpl\ndef check_plan(config):\n    return []\n"
        )
        paths.append({"PYTHONPATH": str(site)})
    with running_nodes(network, *words, token=token, env=paths) as nodes:
        expect_refusal(
            nodes,
            DIFFER,
            "plugin acme: node 0 has 1.0; node 1 has 1.1",
            "install the same version of the plugin",
            fault="other plugin version",
        )


def test_other_weights(network: Network, words: list[str], token: str, tmp_path: Path) -> None:
    """The same shapes with other numbers."""
    other = write_tiny_model(tmp_path / "tiny", "llama", seed=1)
    with running_nodes(
        network, *words[:1], *words[2:], token=token, extra=([words[1]], [f"model.path={other}"])
    ) as nodes:
        expect_refusal(
            nodes, DIFFER, r"weights model.safetensors: node 0 has \d+ bytes", fault="other weights"
        )


def test_one_changed_number_is_found_on_demand(
    network: Network, words: list[str], token: str, folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "tiny"))
    file = other / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2 + 5000] ^= 1
    file.write_bytes(data)
    with running_nodes(
        network,
        *words[:1],
        *words[2:],
        "cluster.verify_weights=full",
        token=token,
        extra=([words[1]], [f"model.path={other}"]),
    ) as nodes:
        expect_refusal(
            nodes,
            DIFFER,
            r"weights model.safetensors: node 0 has \d+ bytes, hash",
            fault="one other number in the weights, cluster.verify_weights=full",
        )


def test_a_node_rank_given_twice(network: Network, words: list[str], token: str) -> None:
    """Of three nodes, two are told that they are node 1."""
    words = [word.replace("tp=2", "tp=12") for word in words]
    with running_nodes(
        network,
        *words,
        token=token,
        nnodes=3,
        ranks=(0, 1, 1),
        extra=([], [], []),
        env=({}, {}, {}),
    ) as nodes:
        expect_refusal(
            nodes,
            r"launch.node_rank=1 was given to two nodes: 10\.98\.0\.2:\d+ .*pid \d+.*10\.98\.0\.2",
            "give each node its own, 0 to 2",
            fault="duplicate node_rank",
        )


def test_another_number_of_nodes(network: Network, words: list[str], token: str) -> None:
    words = [*words[:2], "parallel.tp=12"]  # which both numbers divide
    extra = (["launch.nnodes=2"], ["launch.nnodes=3"])
    with running_nodes(network, *words, token=token, extra=extra, nnodes=None) as nodes:
        expect_refusal(
            nodes,
            r"10\.98\.0\.2:\d+ .*has launch.nnodes=3, node 0 has launch.nnodes=2",
            fault="other nnodes",
        )


def test_a_missing_node_is_named_at_the_deadline(
    network: Network, words: list[str], token: str
) -> None:
    """Node 2 of three never comes."""
    words = [*words[:2], "parallel.tp=12", "cluster.join_timeout_s=4"]
    begin_s = time.monotonic()
    with running_nodes(network, *words, token=token, nnodes=3) as nodes:
        seconds = nodes.end_seconds(begin_s)
        report("missing node, cluster.join_timeout_s=4", seconds)
        assert nodes.statuses() == [2, 2]
        for node in nodes.nodes:
            assert "node 2 of 3 did not join within 4 s (cluster.join_timeout_s)" in node.text
        assert "waiting for node 2 to join at 10.98.0.1:20000" in nodes[0].text
        assert 4 <= max(seconds) < 4 + KNOWN_S


def test_another_token(network: Network, words: list[str], token: str) -> None:
    """The stranger ends; node 0 names it and goes on waiting: a scanner must not end an engine."""
    begin_s = time.monotonic()
    with running_nodes(network, *words, token=(token, secrets.token_hex(32))) as nodes:
        refused_s = nodes[0].wait_for(
            r"error: 10\.98\.0\.2:\d+ came to join and was refused: it has another cluster token"
        )
        assert nodes[1].wait(10) == 2
        assert nodes[1].ended_s is not None
        assert "node 0 at 10.98.0.1:20000 has another cluster token" in nodes[1].text
        report("wrong token", [refused_s - begin_s, nodes[1].ended_s - begin_s])
        assert nodes[1].ended_s - begin_s < KNOWN_S
        assert nodes[0].process.poll() is None


@pytest.mark.parametrize("offset", [0, 1], ids=["control", "store"])
def test_a_port_in_use(network: Network, words: list[str], token: str, offset: int) -> None:
    port = BASE_PORT + offset
    taken = network.inside(0, lambda: socket.create_server((ADDRESSES[0], port)))
    begin_s = time.monotonic()
    with taken, running_nodes(network, *words, token=token) as nodes:
        assert nodes[0].wait(10) == 2
        assert nodes[0].ended_s is not None
        report(f"port in use ({offset=})", [nodes[0].ended_s - begin_s])
        expected = (
            rf"can't listen at 10\.98\.0\.1:{port} .*Address already in use .*pid {os.getpid()}"
        )
        assert re.search(expected, nodes[0].text), nodes[0].text
