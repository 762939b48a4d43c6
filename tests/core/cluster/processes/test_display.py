"""What a person sees: exact texts, with and without a terminal."""

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest

from core.cluster.processes.display import Display, SummaryInfo, summary
from core.interfaces.control import Failed, Progress, Ready, StartPhase

ROOT = Path(__file__).parents[4]

INFO = SummaryInfo(
    served_name="smollm2",
    architecture="LlamaForCausalLM",
    num_parameters=134_515_008,
    dtype="bfloat16",
    dtype_reason="",
    file_bytes=91_700_000,
    plan="tp=3",
    devices="cpu, 1 thread each",
    num_ranks=3,
    kv_tokens=65_536,
    kv_bytes=1_610_612_736,
    memory={},
    graphs="",
    steps="",
    phases={"import": 3.14, "load weights": 2.0},
    total_s=9.84,
    url="http://127.0.0.1:30000",
    needs_key=False,
)


def test_the_summary() -> None:
    assert summary(INFO) == (
        "\n"
        "  model     smollm2: LlamaForCausalLM, 134.5 M parameters, bfloat16, 87.5 MiB of files\n"
        "  plan      tp=3: 3 ranks on cpu, 1 thread each\n"
        "  KV cache  65,536 tokens, 1.5 GiB of this machine's memory (engine.kv_cache_tokens)\n"
        "  start-up  9.8 s (import 3.1, load weights 2.0)\n"
        "  URL       http://127.0.0.1:30000\n"
        "\n"
        "  curl http://127.0.0.1:30000/v1/chat/completions -H 'Content-Type: application/json' "
        '-d \'{"model": "smollm2", "messages": [{"role": "user", '
        '"content": "What is the capital of France?"}], "temperature": 0}\'\n'
    )


def test_the_summary_of_a_dummy_model_on_one_rank_with_a_key() -> None:
    info = replace(
        INFO, plan="tp=1", num_ranks=1, devices="cuda:0", file_bytes=0, phases={}, needs_key=True
    )
    text = summary(info)
    assert "134.5 M parameters, bfloat16, random weights\n" in text
    assert "  plan      tp=1: 1 rank on cuda:0\n" in text
    assert "  start-up  9.8 s\n" in text
    assert "memory" not in text
    assert "graphs" not in text
    assert ' -H "Authorization: Bearer $NODEWEAVE_API_KEY" -d ' in text


def test_the_summary_tells_what_a_gpu_holds() -> None:
    memory = {"weights": 16_060_522_496, "KV pool": 34_361_835_520, "activations": 2_217_264_640}
    told = replace(INFO, memory=memory, graphs="11 decode steps of up to 64 requests")
    text = summary(replace(told, steps="up to 64 requests"))
    assert (
        "  memory    weights 15.0 GiB, KV pool 32.0 GiB, activations 2.1 GiB on each rank\n"
        "  steps     up to 64 requests\n"
        "  graphs    11 decode steps of up to 64 requests\n"
    ) in text


def test_the_summary_tells_why_a_cpu_computes_in_another_dtype() -> None:
    reason = "not the checkpoint's bfloat16: this CPU has no instructions for it (avx512_bf16)"
    text = summary(replace(INFO, dtype="float32", dtype_reason=reason))
    assert f"parameters, float32, 87.5 MiB of files\n  dtype     float32, {reason}\n" in text


def test_the_curl_line_survives_a_shell() -> None:
    name = 'it\'s a "model"'
    (line,) = [x for x in summary(replace(INFO, served_name=name)).splitlines() if "curl" in x]
    words = shlex.split(line)
    assert words[:2] == ["curl", "http://127.0.0.1:30000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == name


def test_without_a_terminal_each_phase_ends_in_one_line() -> None:
    out, err = io.StringIO(), io.StringIO()
    display = Display(num_workers=2, stderr=err, stdout=out)
    for name, seconds in (("worker 0", 1.0), ("worker 1", 2.5)):
        display.status(name, Progress("load weights", 1, 2, "tensors"))
        display.status(name, StartPhase("import", seconds))
        display.status(name, Ready({}))
    display.status("worker 0", StartPhase("warm up", 0.1))
    display.status("worker 0", Failed("ModelError", "the supervisor reports it"))
    assert err.getvalue() == "import: 2.5 s\n"
    assert display.phases == {"import": 2.5, "warm up": 0.1}
    display.error("two\nlines")
    assert err.getvalue() == "import: 2.5 s\nerror: two\nlines\n"
    display.summary(INFO)
    assert out.getvalue() == summary(INFO) + "\n"


SCRIPT = """
import pytest

from core.cluster.processes.display import Display
from core.interfaces.control import StartPhase, Progress
display = Display()
for done in (0, 30 << 20, 60 << 20):
    display.status("start", Progress("download smollm2", done, 60 << 20, "B"))
display.num_workers = 2
for name in ("worker 0", "worker 1"):  # the first is done before the second begins
    for done in (1, 100, 200):
        display.status(name, Progress("load weights", done, 200, "tensors"))
display.status("worker 0", StartPhase("load weights", 2.0))
display.status("worker 0", Progress("warm up", 1, 4, "steps"))
display.error("stopped")
"""


def test_without_a_terminal_waiting_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    err = io.StringIO()
    display = Display(stderr=err)
    for _ in range(80):
        display.waiting(f"waiting for node 1 ({now_s - 100:g} s)")
        now_s += 0.1
    display.note("node 1 is here")
    assert [re.sub(r"\.\d+", "", line) for line in err.getvalue().splitlines()] == [
        "waiting for node 1 (1 s)",
        "waiting for node 1 (6 s)",
        "node 1 is here",
    ]


WAITING_SCRIPT = """
from core.cluster.processes.display import Display
from core.interfaces.control import Progress
display = Display()
for second in range(5):
    display.waiting(f"waiting for node 1 ({second} s)")
display.note("node 1 is here")
display.waiting("waiting for node 2 " + 300 * "x")
display.status("worker 0", Progress("load weights", 1, 2, "tensors"))
display.waiting("not shown beside bars")
display.note("above the bar")
display.status("worker 0", Progress("load weights", 2, 2, "tensors"))
display.waiting("waiting for node 3")
display.error("stopped")
"""


def test_a_terminal_has_one_line_that_says_what_is_waited_for() -> None:
    text = terminal_output(80, WAITING_SCRIPT)
    screen = [
        re.sub(r".*\x1b\[K", "", line.rstrip("\r")).rsplit("\r", 1)[-1] for line in text.split("\n")
    ]
    assert screen[0] == "node 1 is here"
    assert "above the bar" in screen[1]
    assert screen[2].startswith("load weights: 100%")
    assert screen[3:] == ["error: stopped", ""]
    assert "not shown" not in text
    assert "(4 s)" in text
    assert max(map(len, re.findall(r"waiting for node 2 x+", text))) == 79


def terminal_output(columns: int, script: str = SCRIPT) -> str:
    """The raw text that a script writes to a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=theirs)
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 4096):
            text += chunk
    except OSError:  # EIO: the other side is closed
        pass
    os.close(ours)
    assert process.wait(timeout=30) == 0
    return text.decode()


@pytest.mark.parametrize("columns", [120, 60, 0])
def test_a_terminal_shows_one_bar_for_each_task(columns: int) -> None:
    text = terminal_output(columns)
    # What stays on screen: of each line, what follows its last carriage return.
    screen = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
    assert re.match(r"download smollm2: 100%\|█+\| 60\.0M/60\.0M \[", screen[0])
    assert re.match(r"load weights: 100%\|█+\| 400/400 \[", screen[1])
    assert re.match(r"warm up: .*1/4 \[", screen[2])
    assert screen[3:] == ["error: stopped", ""]
