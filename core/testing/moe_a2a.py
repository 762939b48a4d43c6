"""The contract of moe_a2a plugins: dispatch, any experts, combine is dense MoE.

    from core.testing.moe_a2a import CASES, check_dispatcher

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_contract(case):
        check_dispatcher(lambda spec: AcmeDispatcher(AcmeOptions(), spec), case, ep=4)

A case is a routing and the rows of each rank over a few steps; experts are functions of which no
two agree, and the oracle is each row through each of its experts in float64. Everything is a pure
function of (case, ep), so that ranks in other processes need no messages.
Shape legend: T rows of a rank, K experts of a row, E hidden size.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.devices.select import select_row_ops
from core.interfaces.comm import Comms, Communicator
from core.interfaces.moe_a2a import A2ASpec, Dispatched, Dispatcher, ExpertLayout, Routes
from core.ops.block_fp8 import dequantize_rows
from core.parallel.experts import default_placement
from core.parallel.plan import Plan
from core.testing.ranks import plan_comms, run_ranks

# Rows of each rank in a step, by name.
COUNTS: dict[str, Callable[[int, int], list[int]]] = {
    "random": lambda ep, step: [(7 * (rank + step) + 3) % 11 for rank in range(ep)],
    "equal": lambda ep, step: [6] * ep,
    "one_empty": lambda ep, step: [0 if rank == step % ep else 5 for rank in range(ep)],
    "all_empty": lambda ep, step: [0] * ep,
    "one_has_most": lambda ep, step: [16 if rank == ep - 1 else 1 for rank in range(ep)],
    "only_one": lambda ep, step: [9 if rank == ep // 2 else 0 for rank in range(ep)],
}
MAX_ROWS = 16
CPU = torch.device("cpu")
NUM_STEPS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One dispatcher and the steps it is taken through."""

    counts: str = "random"
    routing: str = "random"  # or "one_expert", "padded", "nothing", "one_rank", "nan_row"
    num_experts: int = 16  # logical
    redundant: int = 0
    top_k: int = 4
    dtype: torch.dtype = torch.float32
    fp8: bool = False

    def __str__(self) -> str:
        dtype = "fp8" if self.fp8 else str(self.dtype).removeprefix("torch.")
        return (
            f"{self.counts}-{self.routing}-x{self.num_experts}+{self.redundant}-k{self.top_k}"
            f"-{dtype}"
        )


MakeDispatcher = Callable[[A2ASpec], Dispatcher]  # one rank's, on the rank's thread
DEFAULT = Case()
CASES = [
    *(replace(DEFAULT, counts=counts) for counts in COUNTS),
    *(
        replace(DEFAULT, routing=routing, top_k=top_k)
        for routing, top_k in (
            ("one_expert", 1),
            ("padded", 4),
            ("nothing", 2),
            ("one_rank", 3),
            ("nan_row", 4),
        )
    ),
    *(replace(DEFAULT, top_k=top_k) for top_k in (1, 2, 3, 5, 6, 7, 8)),
    replace(DEFAULT, redundant=4),
    replace(DEFAULT, redundant=16, top_k=8, counts="one_empty"),
    *(replace(DEFAULT, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)),
    replace(DEFAULT, dtype=torch.bfloat16, redundant=8, routing="padded"),
    replace(DEFAULT, dtype=torch.bfloat16, fp8=True),
    replace(DEFAULT, dtype=torch.bfloat16, fp8=True, counts="all_empty"),
    replace(DEFAULT, dtype=torch.bfloat16, fp8=True, counts="one_has_most", routing="padded"),
]


def check_dispatcher(
    make: MakeDispatcher,
    case: Case,
    ep: int,
    *,
    phase: str = "prefill",
    hidden_size: int = 48,
    device: torch.device = CPU,
    fp8: bool = False,
    wrap: Callable[[Communicator], Communicator] = lambda comm: comm,
) -> None:
    """Build a dispatcher on each of `ep` ranks (threads of this process), take it through a case's
    steps, and compare what every rank gets with dense MoE.

    `fp8`: the rows of cases that allow it do travel as float8. `wrap`: puts something around the
    communicator of threads, which is all of `core.interfaces.comm.Communicator`. Raises
    AssertionError where the contract is broken, ValueError where the case's experts don't divide
    over `ep` ranks.
    """
    if (case.num_experts + case.redundant) % ep:
        raise ValueError(f"{case.num_experts + case.redundant} experts don't divide over ep={ep}")

    def work(comms: Comms) -> list[Tensor]:
        comm = wrap(comms.axes["ep"])
        dispatcher = make(spec_of(case, comm, phase, hidden_size, device))
        return run_steps(case, dispatcher, comm, hidden_size, device)

    for rank, got in enumerate(run_ranks(plan_comms(Plan(dp=ep, ep=ep)), work)):
        check_results(case, ep, rank, got, hidden_size, fp8_on=device if fp8 and case.fp8 else None)


def check_results(
    case: Case,
    ep: int,
    rank: int,
    got: list[Tensor],
    hidden_size: int,
    *,
    fp8_on: torch.device | None = None,
) -> None:
    """Compare what a rank got out of each step (`run_steps`) with dense MoE. For ranks that are
    processes. `fp8_on`: see `dense`."""
    assert len(got) == NUM_STEPS
    for step, result in enumerate(got):
        rows = rows_of(case, ep, rank, step, hidden_size)
        expected = dense(case, rows, fp8_on=fp8_on)
        limits = tolerance(case)
        torch.testing.assert_close(
            result.double(), expected, atol=limits["atol"], rtol=limits["rtol"], equal_nan=True
        )
        none = (rows.physical_TK < 0).all(1)
        assert (result[none] == 0).all(), "rows without experts get exactly 0"


@dataclass(frozen=True, slots=True)
class Rows:
    """What one rank brings into one step."""

    x_TE: Tensor
    logical_TK: Tensor
    physical_TK: Tensor
    weights_TK: Tensor


def rows_of(case: Case, ep: int, rank: int, step: int, hidden_size: int) -> Rows:
    """The rows of a rank; ids of a row differ, copies of an expert are taken at random."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case} {ep} {rank} {step}".encode()))
    num_rows = COUNTS[case.counts](ep, step)[rank]
    placement = default_placement(case.num_experts, ep, case.redundant)
    candidates = list(range(case.num_experts))
    if case.routing == "one_rank":  # all experts of each row are on one and the same rank
        candidates = list(placement.local(ep - 1))
    order = torch.rand(num_rows, len(candidates), generator=generator).argsort(1)[:, : case.top_k]
    logical_TK = torch.tensor(candidates)[order]
    if case.routing == "one_expert":
        logical_TK = torch.full((num_rows, 1), case.num_experts - 1)
    copies = [placement.copies(logical) for logical in range(case.num_experts)]
    draw_TK = torch.randint(0, 1 << 30, logical_TK.shape, generator=generator)
    physical_TK = logical_TK.clone()
    for row, column in torch.ones_like(logical_TK).nonzero().tolist():
        of_expert = copies[int(logical_TK[row, column])]
        physical_TK[row, column] = of_expert[int(draw_TK[row, column]) % len(of_expert)]
    weights_TK = torch.rand(logical_TK.shape, generator=generator)
    padding = {"padded": num_rows // 2, "nothing": 0}.get(case.routing, num_rows)
    physical_TK[padding:], weights_TK[padding:] = -1, 0.0
    x_TE = torch.randn(num_rows, hidden_size, generator=generator).to(case.dtype)
    if case.routing == "nan_row":  # the first of each rank: no other may notice
        x_TE[:1] = float("nan")
    return Rows(x_TE, logical_TK, physical_TK, weights_TK)


def expert(logical: int, x: Tensor) -> Tensor:
    """An expert: any function that no other expert agrees with, mixing neighbouring columns."""
    generator = torch.Generator().manual_seed(logical)
    scale_E = torch.randn(x.shape[-1], generator=generator, dtype=torch.float64)
    shift_E = torch.randn(x.shape[-1], generator=generator, dtype=torch.float64)
    return torch.tanh(x.double() * scale_E + x.double().roll(1, -1) * shift_E)


def dense(case: Case, rows: Rows, *, fp8_on: torch.device | None = None) -> Tensor:
    """What dense MoE gives: every row through each of its experts, in float64. `fp8_on`: of the
    rows as float8 holds them, made on that device (devices round ties differently)."""
    x_TE = rows.x_TE
    if fp8_on is not None:
        x_TE = dequantize_rows(
            *select_row_ops(fp8_on).quantize_rows(x_TE.to(fp8_on)), torch.float32
        ).cpu()
    out_TE = torch.zeros(rows.x_TE.shape, dtype=torch.float64)
    for logical in range(case.num_experts):
        weight_T = (rows.weights_TK * (rows.logical_TK == logical)).sum(1).double()
        out_TE += weight_T[:, None] * expert(logical, x_TE)
    return out_TE


def spec_of(
    case: Case, comm: Communicator, phase: str, hidden_size: int, device: torch.device
) -> A2ASpec:
    """The spec that a dispatcher is built for."""
    return A2ASpec(
        comm=comm,
        num_experts=case.num_experts + case.redundant,
        top_k=case.top_k,
        hidden_size=hidden_size,
        dtype=case.dtype,
        device=device,
        ops=select_row_ops(device),
        max_rows=MAX_ROWS,
        phase=phase,
        fp8=case.fp8,
    )


def run_steps(
    case: Case,
    dispatcher: Dispatcher,
    comm: Communicator,
    hidden_size: int,
    device: torch.device = CPU,
) -> list[Tensor]:
    """What a rank gets out of each step, on the CPU."""
    placement = default_placement(case.num_experts, comm.size, case.redundant)
    results = []
    for step in range(NUM_STEPS):
        rows = rows_of(case, comm.size, comm.rank, step, hidden_size)
        counts = COUNTS[case.counts](comm.size, step)
        given = rows.x_TE.clone().to(device)
        dispatched = dispatcher.dispatch(
            given, rows.physical_TK.to(device), rows.weights_TK.to(device), counts
        )
        unchanged = given.cpu().equal(rows.x_TE) or case.routing == "nan_row"
        assert unchanged, "dispatch changed its argument"
        output = apply_experts(case, dispatcher, dispatched, placement.local(comm.rank))
        result = dispatcher.combine(output, dispatched)
        assert result.shape == rows.x_TE.shape
        assert result.dtype == case.dtype
        assert result.device == given.device
        results.append(result.clone().cpu())
    return results


def apply_experts(
    case: Case, dispatcher: Dispatcher, dispatched: Dispatched, owners: tuple[int, ...]
) -> Tensor:
    """Each local expert's function on its rows; what nobody may read is NaN. `owners`: the logical
    expert of each local one."""
    if dispatched.routes is not None:
        assert dispatcher.layout is ExpertLayout.ROUTED
        hidden = dispatched.hidden
        if dispatched.scales is not None:
            assert hidden.dtype == torch.float8_e4m3fn
            hidden = dequantize_rows(hidden, dispatched.scales, torch.float32)
        else:
            assert hidden.dtype == case.dtype
        return sum_of_experts(case, hidden, dispatched.routes, owners)
    device = dispatched.hidden.device
    hidden, counts = dispatched.hidden.cpu(), dispatched.counts_L.tolist()
    assert dispatched.counts_L.dtype == torch.int64
    assert len(counts) == len(owners)
    if dispatched.scales is not None:
        assert hidden.dtype == torch.float8_e4m3fn
        hidden = dequantize_rows(hidden, dispatched.scales.cpu(), torch.float32)
    else:
        assert hidden.dtype == case.dtype
    output = torch.full(hidden.shape, float("nan"), dtype=case.dtype)
    first = 0
    for local, (logical, count) in enumerate(zip(owners, counts, strict=True)):
        if dispatcher.layout is ExpertLayout.BATCHED:
            output[local, :count] = expert(logical, hidden[local, :count]).to(case.dtype)
        else:
            rows = slice(first, first + count)
            output[rows] = expert(logical, hidden[rows]).to(case.dtype)
            first += count
    if dispatcher.layout is ExpertLayout.CONTIGUOUS and device == CPU:
        assert hidden.shape[0] == first, "the CPU needs no rows past the counted ones"
    return output.to(device)


def sum_of_experts(case: Case, hidden: Tensor, routes: Routes, owners: tuple[int, ...]) -> Tensor:
    """What the experts' kernel does with rows that nobody moved."""
    x_TE, experts_TK = hidden.cpu(), routes.experts_TK.cpu()
    weights_TK = routes.weights_TK.cpu()
    assert experts_TK.shape == weights_TK.shape == (len(x_TE), case.top_k)
    total_TE = torch.zeros(x_TE.shape)
    for row, of_row in enumerate(experts_TK.tolist()):
        for k, local in enumerate(of_row):
            if local >= 0:
                result_E = expert(owners[local], x_TE[row]).to(case.dtype).float()
                total_TE[row] += weights_TK[row, k] * result_E
    return total_TE.to(hidden.device, case.dtype)


def tolerance(case: Case) -> dict[str, float]:
    """Of the difference to dense MoE: results, partial sums and the sum are rounded."""
    step = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[case.dtype]
    return {"atol": 2.5 * step * case.top_k**0.5, "rtol": 2.5 * step}
