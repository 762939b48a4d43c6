"""Several layers of dispatch, experts and combine in one CUDA graph, and what they must give.

Experts multiply by the number of their copy, so that nothing waits for the device.
Shape legend: T rows of a rank, A rows of all ranks, K experts of a row, E hidden size.
"""

import torch
from torch import Tensor

from core.interfaces.comm import Communicator
from core.interfaces.moe_a2a import Dispatched, Dispatcher
from core.ops.block_fp8 import BLOCK, dequantize_rows, quantize_rows
from core.testing.moe_a2a import COUNTS, Case, Rows, rows_of

NUM_LAYERS, NUM_TURNS = 4, 12
GRAPH_CASES = {
    "plain": Case(dtype=torch.bfloat16, redundant=8, routing="padded", counts="one_has_most"),
    "equal": Case(dtype=torch.bfloat16, top_k=8, counts="equal"),
    "fp8": Case(dtype=torch.bfloat16, fp8=True, counts="one_empty"),
}


def turns(case: Case, ep: int, rank: int, hidden_size: int) -> list[Rows]:
    """Other rows and routings of as many rows: steps whose counts equal the first's."""
    counts = COUNTS[case.counts](ep, 0)
    same = [step for step in range(200) if COUNTS[case.counts](ep, step) == counts]
    return [rows_of(case, ep, rank, step, hidden_size) for step in same[:NUM_TURNS]]


def layer_by_layer(case: Case, rows: Rows, num_experts: int, rank: int = 0) -> Tensor:
    """What the layers make of rows, in float64."""
    x_TE = rows.x_TE.double()
    factors_TK = torch.where(rows.physical_TK >= 0, factor_of(rows.physical_TK, num_experts), 0.0)
    factor_T = (factors_TK * rows.weights_TK.double()).sum(1)
    for _ in range(NUM_LAYERS):
        if case.fp8:
            x_TE = dequantize_rows(*quantize_rows(x_TE.bfloat16()), torch.float32).double()
        x_TE = x_TE * factor_T[:, None]
    return x_TE


def factor_of(experts: Tensor, num_experts: int) -> Tensor:
    """Of each expert; about 1, so that layers don't grow."""
    return (experts.double() + 1) / num_experts


def replay(
    case: Case, dispatcher: Dispatcher, comm: Communicator, hidden_size: int, device: torch.device
) -> list[Tensor]:
    """What each turn gives on this rank."""
    all_rows = turns(case, comm.size, comm.rank, hidden_size)
    counts = COUNTS[case.counts](comm.size, 0)
    num_experts = case.num_experts + case.redundant
    first = comm.rank * (num_experts // comm.size)
    block_E = torch.arange(hidden_size, device=device) // BLOCK
    x_TE, experts_TK, weights_TK = (
        part.to(device)
        for part in (all_rows[0].x_TE, all_rows[0].physical_TK, all_rows[0].weights_TK)
    )

    def experts(dispatched: Dispatched) -> Tensor:
        assert dispatched.routes is not None
        ids_AK, weights_AK = dispatched.routes.experts_TK, dispatched.routes.weights_TK
        factors_AK = factor_of(ids_AK + first, num_experts).float() * weights_AK
        here_AK = ids_AK >= 0
        factor_A = torch.where(here_AK, factors_AK, 0.0).sum(1)
        hidden = dispatched.hidden
        if dispatched.scales is not None:
            hidden = hidden.float() * dispatched.scales[:, block_E]
        product = (hidden.float() * factor_A[:, None]).to(case.dtype)
        return torch.where(here_AK.any(1)[:, None], product, float("nan"))

    def layers() -> Tensor:
        out_TE = x_TE
        for _ in range(NUM_LAYERS):
            dispatched = dispatcher.dispatch(out_TE, experts_TK, weights_TK, counts)
            out_TE = dispatcher.combine(experts(dispatched), dispatched)
        return out_TE

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers()  # compiles
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        out_TE = layers()
        graph.capture_end()
        results = []
        for rows in all_rows:
            x_TE.copy_(rows.x_TE)
            experts_TK.copy_(rows.physical_TK)
            weights_TK.copy_(rows.weights_TK)
            graph.replay()
            results.append(out_TE.clone())
        stream.synchronize()
    return results
