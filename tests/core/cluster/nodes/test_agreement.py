"""The report of differences: exact texts."""

import pytest

from core.cluster.nodes.agreement import MAX_SHOWN, differences, report


def test_nothing_to_say_where_all_agree() -> None:
    assert report({0: {"config a": "1"}, 1: {"config a": "1"}}) is None


@pytest.mark.parametrize(
    ("key", "difference", "advice"),
    [
        (
            "config engine.page_size",
            "engine.page_size: node 0 has 16; node 1 has 32",
            "start every node with the same command, but for launch.node_rank",
        ),
        (
            "code core/worker.py",
            "code core/worker.py: node 0 has 16; node 1 has 32",
            "install the same version of Nodeweave",
        ),
        (
            "plugin acme",
            "plugin acme: node 0 has 16; node 1 has 32",
            "install the same version of the plugin, or block it with plugins.blocklist",
        ),
        (
            "package torch",
            "package torch: node 0 has 16; node 1 has 32",
            "install the same version",
        ),
        (
            "weights model.safetensors",
            "weights model.safetensors: node 0 has 16; node 1 has 32",
            "copy the same model files",
        ),
        (
            "machine device",
            "machine device: node 0 has 16; node 1 has 32",
            "use the same kind of device, or set engine.device on every node",
        ),
    ],
)
def test_key_both_values_and_what_to_change(key: str, difference: str, advice: str) -> None:
    assert report({0: {key: "16"}, 1: {key: "32"}}) == (
        f"the nodes differ, so nothing was started:\n  - {difference}\n  - change node 1: {advice}"
    )


def test_what_is_missing_somewhere() -> None:
    (first, _) = differences({0: {}, 1: {"plugin acme": "1.0"}})
    assert first == "plugin acme: node 0 does not have it; node 1 has 1.0"


def test_the_majority_is_right() -> None:
    lines = differences({0: {"config a": "1"}, 1: {"config a": "2"}, 2: {"config a": "2"}})
    assert lines[0] == "a: node 0 has 1; nodes 1, 2 have 2"
    assert lines[1].startswith("change node 0: ")


def test_node_0_is_right_where_there_is_no_majority() -> None:
    lines = differences({0: {"config a": "1"}, 1: {"config a": "2"}, 2: {"config a": "3"}})
    assert lines[1].startswith("change nodes 1, 2: ")


def test_every_difference_is_found_and_long_lists_are_cut() -> None:
    code = {f"code file{index}.py": "x" for index in range(MAX_SHOWN + 5)}
    theirs = dict.fromkeys(code, "y") | {"config b": "1" * 500}
    lines = differences({0: code | {"config b": "2"}, 1: theirs})
    assert len(lines) == MAX_SHOWN + 2 + 2
    assert "code: 5 more differ" in lines
    (line,) = (line for line in lines if line.startswith("b: "))
    assert len(line) < 250
    assert line.endswith("1...")
