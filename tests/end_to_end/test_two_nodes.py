"""Two nodes in network namespaces of their own, joined by a link that can be cut.

The same command on both; then everything that can go wrong, with the seconds it takes until it is
known everywhere. `pytest -s` prints them; docs/faults.md holds them.
"""

import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from core.cluster.processes.process_stat import process_state
from core.settings.compose import compose, parse_overrides
from core.sources.files import resolve_files
from tests.support.formats import FORMATS
from tests.support.models import ignore_progress, write_tiny_model
from tests.support.two_nodes import (
    ADDRESSES,
    BASE_PORT,
    Network,
    Nodes,
    running_nodes,
    two_namespaces,
    why_not,
)

REASON = why_not()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.timeout(240),
]
HTTP_PORT = 30000
KNOWN_S = 5.0  # in which a difference between nodes is known everywhere
ENDED_S = 2.0  # in which everything ends after a death or a cut
SLACK_S = 1.0  # more on a machine that is busy with other tests
# The plan that is compared with transformers: half of its ranks are on each node. The default is
# small enough for two cores; tp16_ep16_dp16 takes half a minute there.
PLAN = os.environ.get("NODEWEAVE_TEST_TWO_NODES_PLAN", "tp4_ep4_dp4")
DIFFER = "the nodes differ, so nothing was started"


@pytest.fixture
def network() -> Iterator[Network]:
    with two_namespaces() as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture
def words(folder: Path) -> list[str]:
    """One rank on each node."""
    return ["+model=custom", f"model.path={folder}", "parallel.tp=2", "cluster.join_timeout_s=30"]


@pytest.fixture(scope="module")
def token() -> str:
    return secrets.token_hex(32)


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


# It works.


def test_the_same_command_on_both_nodes_answers_as_transformers_does(
    network: Network, token: str
) -> None:
    """Attention on each rank's own requests, experts spread over all."""
    from tests.support.oracle import TransformersOracle

    words = ["+model=deepseek_v3_tiny", f"parallel={PLAN}"]
    questions = ["What is the capital of France?" * n for n in (1, 2, 3, 9)]

    def ask(question: str) -> tuple[list[int], list[int]]:
        body = {
            "model": "deepseek_v3_tiny",
            "messages": [{"role": "user", "content": question}],
        }
        prompt = answer("/tokenize", body)["tokens"]
        body |= {"max_tokens": 12, "temperature": 0, "logprobs": True, "ignore_eos": True}
        entries = answer("/v1/chat/completions", body)["choices"][0]["logprobs"]["content"]
        return prompt, [entry["bytes"][0] if entry["bytes"] else 256 for entry in entries]

    with running_nodes(network, *words, token=token) as nodes:
        nodes.wait_ready()
        num_ranks = compose(parse_overrides(words)).parallel.tp
        assert [len(node.workers()) for node in nodes.nodes] == [num_ranks // 2] * 2
        answers = [network.inside(0, lambda q=question: ask(q)) for question in questions]
        nodes[1].process.send_signal(signal.SIGTERM)  # either node's is everyone's
        assert [nodes[0].wait(30), nodes[1].wait(30)] == [0, 0]
    assert "interface veth0" in nodes[1].text
    assert "error" not in nodes[0].text + nodes[1].text
    model = compose(parse_overrides(words)).model
    files = resolve_files(model, FORMATS, ignore_progress)
    oracle = TransformersOracle(Path(files.weight_files[0]).parent)
    for prompt, tokens in answers:
        assert len(tokens) == 12
        oracle.check_greedy(prompt, tokens)


def test_sigterm_on_a_node_lets_running_requests_finish(
    network: Network, words: list[str], token: str
) -> None:
    with running_nodes(network, *words, token=token) as nodes:
        nodes.wait_ready()

        def terminate() -> float:
            nodes[1].process.send_signal(signal.SIGTERM)
            return time.monotonic()

        _, lines = stream_until_end(network, terminate)
        begin_s = time.monotonic()
        assert lines[-1] == "data: [DONE]\n"
        seconds = nodes.end_seconds(begin_s)
        assert nodes.statuses() == [0, 0]
    report("SIGTERM on node 1, after its last stream ended", seconds)


# Nodes that don't fit each other.


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


# Deaths while it starts and while it runs.


def expect_end(nodes: Nodes, begin_s: float, cause: str, *, fault: str, survivor: int) -> None:
    """Everything ends soon after `begin_s`, with the cause on each node that lives."""
    processes = [node.process for node in nodes.nodes]
    seconds = nodes.end_seconds(begin_s)
    report(fault, seconds)
    for rank, node in enumerate(nodes.nodes):
        if survivor in (rank, -1):
            assert re.search(cause, node.text), node.text
            assert "Traceback" not in node.text
    assert all(process.returncode != 0 for process in processes), nodes.statuses()
    assert max(seconds) < ENDED_S + SLACK_S, seconds


def none_left(nodes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(nodes, timeout=2)
    return not alive


def test_a_worker_killed_while_it_starts(network: Network, words: list[str], token: str) -> None:
    with running_nodes(network, *words, token=token) as nodes:
        nodes[0].wait_for("import: ")
        (victim,) = nodes[1].workers()
        others = nodes[0].workers()
        victim.kill()
        begin_s = time.monotonic()
        expect_end(
            nodes,
            begin_s,
            rf"worker 1 on node 1 \(pid {victim.pid}\) was killed by SIGKILL",
            fault="worker killed while it starts",
            survivor=-1,
        )
        assert none_left(others)


@pytest.mark.parametrize("victim_node", [0, 1])
def test_a_worker_killed_in_mid_decode(
    network: Network, words: list[str], token: str, victim_node: int
) -> None:
    with running_nodes(network, *words, token=token) as nodes:
        nodes.wait_ready()
        (victim,) = nodes[victim_node].workers()
        others = nodes[1 - victim_node].workers()

        def kill() -> float:
            victim.kill()
            return time.monotonic()

        begin_s, lines = stream_until_end(network, kill)
        report("its stream ended", [time.monotonic() - begin_s])
        assert '"error"' in lines[-1]
        assert "[DONE]" not in lines[-1]
        name = f"worker {victim_node} on node {victim_node}"
        assert name in lines[-1]
        expect_end(
            nodes,
            begin_s,
            rf"{name} \(pid {victim.pid}\) was killed by SIGKILL",
            fault=f"worker of node {victim_node} killed in mid-decode",
            survivor=-1,
        )
        assert none_left(others)


def test_a_worker_that_is_stopped(network: Network, words: list[str], token: str) -> None:
    with running_nodes(network, *words, token=token) as nodes:
        nodes.wait_ready()
        (victim,) = nodes[1].workers()

        def stop() -> float:
            victim.suspend()
            begin_s = time.monotonic()
            while process_state(victim.pid) != "T":
                assert time.monotonic() - begin_s < 1
            return begin_s

        begin_s, lines = stream_until_end(network, stop)
        assert '"error"' in lines[-1]
        expect_end(
            nodes,
            begin_s,
            rf"worker 1 on node 1 \(pid {victim.pid}\) is frozen: it was stopped by a signal",
            fault="worker stopped (SIGSTOP) in mid-decode",
            survivor=-1,
        )


def test_a_node_s_parent_killed(network: Network, words: list[str], token: str) -> None:
    with running_nodes(network, *words, token=token) as nodes:
        nodes.wait_ready()
        workers = nodes[1].workers()
        nodes[1].process.kill()
        begin_s = time.monotonic()
        expect_end(
            nodes,
            begin_s,
            r"node 1 \(10\.98\.0\.2, .*\) is gone",
            fault="node 1 killed",
            survivor=0,
        )
        assert none_left(workers)


def test_a_link_that_is_cut(network: Network, words: list[str], token: str) -> None:
    with running_nodes(network, *words, token=token) as nodes:
        nodes.wait_ready()

        def cut() -> float:
            network.cut()
            return time.monotonic()

        begin_s, lines = stream_until_end(network, cut)
        report("its stream ended", [time.monotonic() - begin_s])
        assert '"error"' in lines[-1]
        expect_end(
            nodes,
            begin_s,
            r"the link from node [01] \(10\.98\.0\.\d\) to node [01] \(10\.98\.0\.\d.*\) is dead",
            fault="link cut in mid-decode",
            survivor=-1,
        )
