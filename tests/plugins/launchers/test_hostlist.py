"""Slurm's host lists: examples, what can't be read, and that folding then expanding is nothing."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.launchers._hostlist import MAX_HOSTS, expand


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("login,node-a.cluster", ["login", "node-a.cluster"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[01-03,7]", ["node01", "node02", "node03", "node7"]),
        ("node[8-11]", ["node8", "node9", "node10", "node11"]),
        ("node[098-101]", ["node098", "node099", "node100", "node101"]),
        (
            "node[01-03,7],gpu[1-2]-ib[0-1],x",
            [
                *("node01", "node02", "node03", "node7"),
                *("gpu1-ib0", "gpu1-ib1", "gpu2-ib0", "gpu2-ib1", "x"),
            ],
        ),
        ("r[1-2]n[09-10]", ["r1n09", "r1n10", "r2n09", "r2n10"]),
        ("[1-2]rack", ["1rack", "2rack"]),
        ("node[5]", ["node5"]),
        ("node[3,1]", ["node3", "node1"]),
    ],
)
def test_examples(text, hosts):
    assert expand(text) == hosts


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "can't read ''"),
        ("node1,", "can't read ''"),
        (",node1", "can't read ',node1'"),
        ("node[1-3", r"can't read '\[1-3'"),
        ("node1]", r"can't read '\]'"),
        ("node[[1]]", r"can't read"),
        ("node[]", "can't read ''"),
        ("node[1,]", "can't read ''"),
        ("node[a-b]", "can't read 'a-b'"),
        ("node[1-2-3]", "can't read '1-2-3'"),
        ("node[٣]", "can't read"),
        ("node[3-1]", "'3-1' in .* runs backwards"),
        ("node 1", "can't read ' 1'"),
        ("n[0-99999999999]", "too many hosts"),
        ("n[0-999]m[0-999]", "too many hosts"),
        (f"n[1-{MAX_HOSTS}],m", "too many hosts"),
    ],
)
def test_what_cant_be_read_is_named(text, fragment):
    with pytest.raises(ValueError, match=fragment):
        expand(text)


def fold(hosts: list[str]) -> str:
    """The short form as Slurm writes it: neighbours of one prefix and number width share a
    bracket, and counting up becomes a range."""
    items: list[str] = []
    last: tuple[str, int] | None = None  # prefix and width that the open bracket is of
    ranges: list[tuple[int, int]] = []

    def close() -> None:
        if last is not None:
            width = last[1]
            inside = ",".join(
                f"{a:0{width}}" if a == b else f"{a:0{width}}-{b:0{width}}" for a, b in ranges
            )
            items.append(f"{last[0]}[{inside}]")

    for host in hosts:
        match = re.fullmatch(r"(.*?)([0-9]+)", host)
        assert match is not None
        key, number = (match.group(1), len(match.group(2))), int(match.group(2))
        if key != last:
            close()
            last, ranges = key, []
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    close()
    return ",".join(items)


NAMES = st.builds(
    lambda prefix, number, width: f"{prefix}{number:0{width}}",
    st.from_regex(r"[a-z]([a-z0-9-]{0,6}[a-z-])?", fullmatch=True),
    st.integers(0, 1200),
    st.integers(1, 4),
)
RUNS = st.builds(
    lambda prefix, first, count, width: [f"{prefix}{first + i:0{width}}" for i in range(count)],
    st.sampled_from(["n", "gpu-", "rack7-node"]),
    st.integers(0, 1000),
    st.integers(1, 30),
    st.integers(1, 4),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.one_of(NAMES.map(lambda name: [name]), RUNS), min_size=1, max_size=8))
def test_folding_then_expanding_gives_the_names_back(runs):
    hosts = [host for run in runs for host in run]
    assert expand(fold(hosts)) == hosts


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet="n0123[]-, a", max_size=24))
def test_any_text_is_read_or_refused_at_once(text):
    try:
        hosts = expand(text)
    except ValueError:
        return
    assert 0 < len(hosts) <= MAX_HOSTS
    assert all(host and not set(host) & set("[], ") for host in hosts)
