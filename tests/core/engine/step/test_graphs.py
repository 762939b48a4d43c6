"""Captured steps: which sizes, when, and what they read of the host."""

import numpy as np
import pytest
import torch

import core.engine.step.input as step_input
from core.engine.step.decode_graphs import graph_sizes, most_graph_rows, reason_for_eager
from core.engine.step.input import NUM_BLOCKS, StepInput, send_decodes
from core.engine.step.prompt_graphs import padding_pays, prompt_sizes
from core.errors import ConfigError
from core.interfaces.comm import SOLO, Comms, SoloCommunicator
from core.interfaces.messages import ScheduledStep
from core.ops.stage import DecodeRows, packed_length
from core.settings.config import EngineConfig


def test_sizes_rise_and_end_with_the_largest():
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(100) == [1, 2, 4, *range(8, 65, 8), 80, 96, 100]
    assert graph_sizes(256)[-3:] == [224, 240, 256]
    assert graph_sizes(400)[-4:] == [320, 352, 384, 400]
    assert graph_sizes(10, multiple=4) == [4, 8, 12]
    assert most_graph_rows(EngineConfig()) == 256
    assert most_graph_rows(EngineConfig(max_running_requests=4096)) == 512
    assert most_graph_rows(EngineConfig(max_graph_batch=1000, max_running_requests=700)) == 700


def test_sizes_of_steps_with_prompts():
    assert prompt_sizes(63) == []
    assert prompt_sizes(300) == [64, 128, 192, 256]
    assert prompt_sizes(1300)[-3:] == [896, 1024, 1280]
    assert prompt_sizes(128, multiple=48) == [96, 144]


def test_steps_with_prompts_are_padded_on_few_ranks_or_where_many_have_rows():
    assert padding_pays(1024, [897])
    assert padding_pays(1024, [1000, 0])
    assert padding_pays(1024, [1000, 30, 30])
    assert not padding_pays(1024, [1000, 30, 30, 30])
    assert padding_pays(1024, [900] * 9 + [30] * 7)
    assert not padding_pays(1024, [900] * 7 + [30] * 9)
    assert padding_pays(64, [60] + [1] * 31)


def test_what_is_configured_wrongly_is_said():
    with pytest.raises(ConfigError, match=r"engine\.cuda_graphs='on'.*auto, off"):
        EngineConfig(cuda_graphs="on")
    with pytest.raises(ConfigError, match=r"engine\.max_graph_batch=0"):
        EngineConfig(max_graph_batch=0)


class Dispatches:
    capturable = False


def test_why_steps_are_not_captured():
    gpu = torch.device("cuda", 0)
    good = {"attention": True, "dispatcher": None, "comms": SOLO}

    def reason(device=gpu, engine=None, **changes):
        return reason_for_eager(engine or EngineConfig(), device, **(good | changes))

    assert reason() is None
    assert "engine.cuda_graphs=off" in reason(engine=EngineConfig(cuda_graphs="off"))
    assert "cpu" in reason(torch.device("cpu"))
    assert "attention.decode" in reason(attention=False)
    assert "moe_a2a.decode" in reason(dispatcher=Dispatches())
    waiting = Comms(dict(SOLO.axes) | {"tp": SoloCommunicator(capturable=False)})
    assert "axes tp" in reason(comms=waiting)


def test_a_step_in_flight_keeps_its_numbers(monkeypatch):
    """Blocks are used in turn, and one is written only when the device has read it."""
    sent, waited = [], []

    class Read:
        last = None

        def record(self):
            self.last = len(sent)
            sent.append(self.last)

        def synchronize(self):
            if self.last is not None:
                waited.append(self.last)

    monkeypatch.setattr(step_input, "_read", lambda device: Read())
    source = StepInput(packed_length(4), torch.device("cpu"))
    empty = torch.zeros(4, dtype=torch.int64)
    rows = DecodeRows(
        source.packed[: packed_length(4)], empty, empty, empty, empty, torch.zeros(4, 2)
    )
    for step in range(NUM_BLOCKS + 2):
        plan = ScheduledStep(
            step, [], 2, [step, 3], [7, step], [1, 1], [True] * 2, [step], [1], [9]
        )
        slots, positions = send_decodes(source, plan, rows)
        assert slots.tolist() == [step, 3]
        assert positions.tolist() == [7, step]
        packed = rows.packed.tolist()
        assert packed[:4] == [2, 1, step, 3]
        assert packed[6:8] == [7, step]
        assert [packed[10], packed[14], packed[18]] == [step, 1, 9]
        assert sent == list(range(step + 1))
        assert waited == sent[: max(0, step + 1 - NUM_BLOCKS)]
    arrays = {block.array(1).ctypes.data for block in source._blocks}
    assert len(arrays) == NUM_BLOCKS
    crowded = ScheduledStep(0, [], 1, [1], [2], [1], [True], [1] * 5, list(range(5)), [3] * 5)
    send_decodes(source, crowded, rows)
    assert np.array_equal(rows.packed[:2], [1, 0])  # whoever calls has entered the pages
