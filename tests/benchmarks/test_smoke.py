"""Every benchmark is run by `make bench-smoke` or left out for a reason; a failure is told."""

import sys
from pathlib import Path

import pytest

from benchmarks import smoke

FOLDER = Path(smoke.__file__).parent


def programs() -> set[str]:
    """What `python -m benchmarks.NAME` runs."""
    files = [*FOLDER.glob("*.py"), *FOLDER.glob("*/__main__.py")]
    return {
        file.parent.name if file.name == "__main__.py" else file.stem
        for file in files
        if '__name__ == "__main__"' in file.read_text()
    }


def test_every_benchmark_is_there_or_left_out_for_a_reason():
    left_out = {name for name in programs() if name.startswith(tuple(smoke.LEFT_OUT))}
    assert programs() - left_out == set(smoke.SMALLEST)
    for word in smoke.LEFT_OUT:
        assert any(name.startswith(word) for name in programs()), word


@pytest.mark.parametrize(
    ("code", "fragment"),
    [
        ("print('{}')", None),
        ("print('a table'); print('[1, 2]')", None),
        ("import json; print(json.dumps({'a': [1]}, indent=1))", None),
        ("print('1')", "printed no JSON"),
        ("print('{}'); raise ValueError('broken')", "broken"),
    ],
)
def test_what_counts_as_running(code, fragment):
    problem = smoke.run([sys.executable, "-c", code])
    assert problem is None if fragment is None else fragment in problem


def test_one_that_does_not_end_is_told():
    code = "import signal; signal.pause()"
    assert "did not end" in smoke.run([sys.executable, "-c", code], limit_s=0.5)


def test_a_failure_is_the_status(monkeypatch, capsys):
    monkeypatch.setitem(smoke.SMALLEST, "scheduler_step", ["--no-such-flag"])
    assert smoke.main(["scheduler_step"]) == 1
    printed = capsys.readouterr()
    assert "scheduler_step: status 2" in printed.out
    assert "1 of 1 failed: scheduler_step" in printed.err
