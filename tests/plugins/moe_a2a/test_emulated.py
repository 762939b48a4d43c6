"""Dispatch without peers: what the contract of dispatchers says, except values."""

from dataclasses import replace

import pytest
import torch

from core.devices.select import select_row_ops
from core.interfaces.moe_a2a import A2ASpec, ExpertLayout
from plugins.comm.emulated import EmulatedCommunicator
from plugins.moe_a2a._options import EmulatedOptions
from plugins.moe_a2a.emulated import EmulatedDispatcher

EP, NUM_EXPERTS, TOP_K, HIDDEN = 4, 16, 3, 256
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LAYOUTS = ["contiguous", "batched"]


def spec(device: str = "cpu", fp8: bool = False) -> A2ASpec:
    return A2ASpec(
        comm=EmulatedCommunicator(1, EP),
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        dtype=torch.bfloat16,
        device=torch.device(device),
        ops=select_row_ops(torch.device(device)),
        max_rows=32,
        phase="decode",
        fp8=fp8,
    )


def rows(num: int, num_padding: int, device: str) -> tuple[torch.Tensor, ...]:
    x = torch.randn(num, HIDDEN, dtype=torch.bfloat16, device=device)
    experts = (
        torch.stack([torch.randperm(NUM_EXPERTS)[:TOP_K] for _ in range(num)])
        if num
        else (torch.zeros(0, TOP_K, dtype=torch.int64))
    )
    weights = torch.rand(num, TOP_K)
    experts[num - num_padding :], weights[num - num_padding :] = -1, 0.0
    return x, experts.to(device), weights.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("num", "num_padding"), [(1, 0), (7, 0), (32, 5), (6, 6), (0, 0)])
def test_own_pairs_stand_in_for_received_ones(
    device: str, layout: str, fp8: bool, num: int, num_padding: int
) -> None:
    dispatcher = EmulatedDispatcher(EmulatedOptions(layout=layout), spec(device, fp8))
    x, experts, weights = rows(num, num_padding, device)
    given = x.clone()
    dispatched = dispatcher.dispatch(x, experts, weights, [num] * EP)
    assert torch.equal(given, x)
    counts = dispatched.counts_L
    assert counts.dtype == torch.int64
    assert counts.shape == (NUM_EXPERTS // EP,)
    assert int(counts.sum()) == num * TOP_K
    hidden = dispatched.hidden
    assert hidden.shape[-1] == HIDDEN
    assert hidden.dtype == (torch.float8_e4m3fn if fp8 else torch.bfloat16)
    assert (dispatched.scales is not None) == fp8
    if dispatched.scales is not None:
        assert dispatched.scales.shape == (*hidden.shape[:-1], HIDDEN // 128)
    if dispatcher.layout is ExpertLayout.BATCHED:
        assert hidden.shape[0] == NUM_EXPERTS // EP
        assert hidden.shape[1] >= int(counts.max())
    else:
        assert hidden.shape[0] >= int(counts.sum())
    out = dispatcher.combine(torch.ones_like(hidden, dtype=torch.bfloat16), dispatched)
    assert out.shape == x.shape
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), weights.sum(1, keepdim=True).expand(num, HIDDEN), rtol=0.01, atol=0
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fp8", [False, True])
def test_identity_experts_give_each_row_its_own_values(device: str, layout: str, fp8: bool) -> None:
    """What lies before the experts are the rows, wherever they were put."""
    dispatcher = EmulatedDispatcher(EmulatedOptions(layout=layout), spec(device, fp8))
    x, experts, weights = rows(9, 2, device)
    dispatched = dispatcher.dispatch(x, experts, weights, [9] * EP)
    seen = dispatched.hidden.float()
    if dispatched.scales is not None:
        seen = seen * dispatched.scales.repeat_interleave(128, -1)
    out = dispatcher.combine(seen.to(torch.bfloat16), dispatched)
    expected = x.float() * weights.sum(1, keepdim=True)
    assert (out.float() - expected).norm() <= expected.norm() * (0.05 if fp8 else 0.01)


def test_local_experts_get_equal_shares_on_average() -> None:
    large = replace(spec(), max_rows=4096)
    dispatcher = EmulatedDispatcher(EmulatedOptions(), large)
    x, experts, weights = rows(4096, 0, "cpu")
    counts = dispatcher.dispatch(x, experts, weights, [4096] * EP).counts_L
    share = counts.double() / counts.sum() * len(counts)
    assert share.min() > 0.95
    assert share.max() < 1.05


def test_the_seed_decides_where_rows_go() -> None:
    x, experts, weights = rows(20, 0, "cpu")

    def counts(seed: int) -> list[int]:
        dispatcher = EmulatedDispatcher(EmulatedOptions(seed=seed), spec())
        return dispatcher.dispatch(x, experts, weights, [20] * EP).counts_L.tolist()

    assert counts(1) == counts(1)
    assert counts(1) != counts(2)


def test_it_can_be_captured() -> None:
    assert EmulatedDispatcher(EmulatedOptions(), spec()).capturable


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("num", [0, 1, 9, 32])
def test_routed_rows_lie_once_for_each_rank_and_each_pair_once(fp8: bool, num: int) -> None:
    dispatcher = EmulatedDispatcher(EmulatedOptions(layout="routed"), spec("cpu", fp8))
    x, experts, weights = rows(num, 0, "cpu")
    dispatched = dispatcher.dispatch(x, experts, weights, [num] * EP)
    assert dispatched.routes is not None
    assert dispatched.hidden.shape == (EP * num, HIDDEN)
    here_AK = dispatched.routes.experts_TK >= 0
    assert here_AK.view(EP, num, TOP_K).sum(0).eq(1).all()
    assert (dispatched.routes.experts_TK < NUM_EXPERTS // EP).all()
    seen = dispatched.hidden.float()
    if dispatched.scales is not None:
        seen = seen * dispatched.scales.repeat_interleave(128, -1)
    factors = torch.where(here_AK, dispatched.routes.weights_TK, 0.0).sum(1, keepdim=True)
    out = dispatcher.combine((seen * factors).to(torch.bfloat16), dispatched)
    assert out.dtype == torch.bfloat16
    expected = x.float() * weights.sum(1, keepdim=True)
    assert (out.float() - expected).norm() <= expected.norm() * (0.05 if fp8 else 0.01)
