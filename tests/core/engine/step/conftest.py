"""Engines that capture their steps."""

import pytest

import core.engine.sample.choosing as choosing
import core.engine.step.decode_graphs as graphs
import core.engine.step.recorder as recorder
from core.ops.torch_ops import TorchOps
from core.testing.ranks import ThreadCommunicator
from tests.support.replay import CUDA, RunAgain


@pytest.fixture
def replayed(monkeypatch):
    """Engines built from now on capture; the recorders they use."""
    made = []

    def made_recorder(device):
        made.append(recorder.CudaRecorder(device) if CUDA else RunAgain())
        return made[-1]

    monkeypatch.setattr(recorder, "select_recorder", made_recorder)
    monkeypatch.setattr(choosing, "FEW_LOGITS", 0)  # not even of few rows logits are gathered
    if not CUDA:
        monkeypatch.setattr(graphs, "reason_for_eager", lambda *_, **__: None)
        monkeypatch.setattr(ThreadCommunicator, "capturable", True)
        monkeypatch.setattr("core.engine.build.loaded.select_ops", lambda _: TorchOps())
    return made
