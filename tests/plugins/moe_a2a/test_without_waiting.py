"""On a GPU, dispatchers whose sizes the host knows don't wait for the device: they can be captured
in a graph, and replayed with other routings."""

import pytest
import torch
from torch import Tensor

from core.devices.select import select_row_ops
from core.interfaces.comm import SoloCommunicator
from core.interfaces.moe_a2a import A2ASpec, Dispatcher, ExpertLayout
from plugins.moe_a2a import nccl
from plugins.moe_a2a._options import AllGatherOptions, NcclOptions
from plugins.moe_a2a.allgather import AllGatherDispatcher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NUM_ROWS, NUM_EXPERTS, TOP_K, HIDDEN = 24, 16, 4, 256


def spec() -> A2ASpec:
    return A2ASpec(
        comm=SoloCommunicator(),
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        ops=select_row_ops(torch.device("cuda")),
        max_rows=NUM_ROWS,
        phase="decode",
    )


DISPATCHERS = {
    "allgather": lambda: AllGatherDispatcher(AllGatherOptions(), spec()),
    "nccl-fixed": lambda: nccl.create(NcclOptions(), spec()),
    "allgather-batched": lambda: AllGatherDispatcher(AllGatherOptions(layout="batched"), spec()),
}


def routed(seed: int) -> tuple[Tensor, Tensor]:
    """(experts, weights), the last rows being padding."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(NUM_ROWS, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    weights_TK = torch.rand(NUM_ROWS, TOP_K, generator=generator)
    padding = NUM_ROWS - 1 - seed
    order[padding:], weights_TK[padding:] = -1, 0.0
    return order.cuda(), weights_TK.cuda()


def scaled_by_expert(dispatcher: Dispatcher, x_TE: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Experts that multiply by their number + 1, without waiting."""
    dispatched = dispatcher.dispatch(x_TE, ids, weights, [NUM_ROWS])
    if dispatched.routes is not None:
        ids_AK, weights_AK = dispatched.routes.experts_TK, dispatched.routes.weights_TK
        factors = (weights_AK * (ids_AK + 1)).sum(1, keepdim=True)
    elif dispatcher.layout is ExpertLayout.BATCHED:
        factors = torch.arange(1, NUM_EXPERTS + 1, device="cuda")[:, None, None]
    else:
        ends = dispatched.counts_L.cumsum(0)
        places = torch.arange(dispatched.hidden.shape[0], device="cuda")
        factors = torch.searchsorted(ends, places, right=True)[:, None] + 1
    return dispatcher.combine((dispatched.hidden * factors).bfloat16(), dispatched)


@pytest.mark.parametrize("name", list(DISPATCHERS))
def test_a_graph_replays_other_routings(name: str) -> None:
    dispatcher = DISPATCHERS[name]()
    x_TE = torch.randn(NUM_ROWS, HIDDEN, device="cuda").bfloat16()
    ids, weights = routed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaled_by_expert(dispatcher, x_TE, ids, weights)  # compiles
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = scaled_by_expert(dispatcher, x_TE, ids, weights)
    for seed in (1, 2):
        other_ids, other_weights = routed(seed)
        ids.copy_(other_ids)
        weights.copy_(other_weights)
        graph.replay()
        factor_T = (other_weights.double() * (other_ids + 1)).sum(1)
        expected = x_TE.double() * factor_T[:, None]
        torch.testing.assert_close(got.double(), expected, atol=0.05, rtol=0.02)
