"""Times the CPU operations and attention of SmolLM2-135M's shape, without an engine; prints JSON.

    OMP_NUM_THREADS=2 python -m benchmarks.cpu_ops

One step is what a model does between token ids and logits: 30 layers of norms, projections, RoPE,
cache writes and attention, then the logits of one row a sequence. Each figure is the least of
several runs, because neighbours on the machine only ever add. Knows nothing of scheduling.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from core.devices.select import select_ops
from core.interfaces.attention import AttentionSpec, LayerKV, SequenceBatch
from core.interfaces.ops import LinearKernel
from core.plugin.hookspecs import NoOptions
from plugins.attention._cpu.heads import CpuBackend, build

CPU = torch.device("cpu")
NUM_LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 30, 576, 1536, 49152
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
PAGE_SIZE = 16
EPS = 1e-5
# Tokens a second of vLLM's CPU build with the same model, dtype and two cores.
PEER_DECODE = {1: 34.0, 4: 168.0, 16: 268.0}
PEER_PREFILL = 787.0


class Layers:
    """Random weights of the model's shape and one step over them, part by part timed."""

    def __init__(self, dtype: torch.dtype, num_pages: int) -> None:
        self.ops = select_ops(CPU)
        self.dtype = dtype
        width = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
        shapes = {
            "qkv": (width, HIDDEN),
            "o": (HIDDEN, NUM_HEADS * HEAD_DIM),
            "gate_up": (2 * INTERMEDIATE, HIDDEN),
            "down": (HIDDEN, INTERMEDIATE),
        }
        self.linears = [
            {name: self._linear(*shape) for name, shape in shapes.items()}
            for _ in range(NUM_LAYERS)
        ]
        head_VE = torch.randn(VOCABULARY, HIDDEN) * HIDDEN**-0.5
        self.head = self.ops.logits(head_VE.to(dtype))
        self.norm_weight_E = torch.randn(HIDDEN).to(dtype)
        self.cos_sin_CD = torch.randn(8192, HEAD_DIM)
        kv_shape = (NUM_LAYERS, num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
        k, v = (torch.randn(kv_shape).to(dtype) for _ in range(2))
        self.caches = [LayerKV(k[layer], v[layer]) for layer in range(NUM_LAYERS)]
        self.seconds: dict[str, float] = {}

    def _linear(self, outputs: int, inputs: int) -> LinearKernel:
        weight_OI = torch.randn(outputs, inputs) * inputs**-0.5
        return self.ops.linear(weight_OI.to(self.dtype), None)

    def step(
        self, backend: CpuBackend, batch: SequenceBatch, positions_T: Tensor, slots_T: Tensor
    ) -> None:
        """One forward of the whole model; adds to `seconds` by kind of operation."""
        self.seconds = dict.fromkeys(("linear", "norm", "rope", "write_kv", "attention", "act"), 0)
        ops, since = self.ops, time.perf_counter()

        def lap(kind: str) -> None:
            nonlocal since
            now = time.perf_counter()
            self.seconds[kind] += now - since
            since = now

        residual_TE = torch.randn(positions_T.shape[0], HIDDEN).to(self.dtype)
        since = time.perf_counter()
        plan = backend.plan(batch)
        lap("attention")
        x_TE = ops.rms_norm(residual_TE, self.norm_weight_E, EPS)
        for linears, cache in zip(self.linears, self.caches, strict=True):
            lap("norm")
            qkv_THD = linears["qkv"](x_TE).view(len(x_TE), -1, HEAD_DIM)
            lap("linear")
            q_THD, k_TGD, v_TGD = qkv_THD.split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), dim=1)
            q_THD, k_TGD = ops.rope(q_THD, k_TGD, self.cos_sin_CD, positions_T)
            lap("rope")
            ops.write_kv(k_TGD, v_TGD, cache.k_NPGD, cache.v_NPGD, slots_T)
            lap("write_kv")
            out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
            backend.forward(plan, cache, q_THD, out_THD)
            lap("attention")
            x_TE = linears["o"](out_THD.flatten(1))
            lap("linear")
            x_TE, residual_TE = ops.add_rms_norm(x_TE, residual_TE, self.norm_weight_E, EPS)
            lap("norm")
            gate_up_T2I = linears["gate_up"](x_TE)
            lap("linear")
            x_TI = ops.silu_and_mul(gate_up_T2I)
            lap("act")
            x_TE = linears["down"](x_TI)
            lap("linear")
            x_TE, residual_TE = ops.add_rms_norm(x_TE, residual_TE, self.norm_weight_E, EPS)
        lap("norm")
        self.head(x_TE[batch.query_starts_S1[1:].long() - 1])
        lap("linear")


def make_batch(rows: list[int], contexts: list[int]) -> tuple[SequenceBatch, Tensor, Tensor]:
    """Sequences over permuted pages, with the positions and token slots of their new rows."""
    generator = torch.Generator().manual_seed(0)
    pages = max(contexts) // PAGE_SIZE + 1
    order = torch.randperm(len(rows) * pages, generator=generator) + 1
    table_SM = order.view(len(rows), pages).int()
    positions = [torch.arange(c - r, c) for r, c in zip(rows, contexts, strict=True)]
    slots = [
        table_SM[index, p // PAGE_SIZE].long() * PAGE_SIZE + p % PAGE_SIZE
        for index, p in enumerate(positions)
    ]
    starts_S1 = torch.tensor(list(accumulate(rows, initial=0)), dtype=torch.int32)
    lengths_S = torch.tensor(contexts, dtype=torch.int32)
    batch = SequenceBatch(rows, contexts, starts_S1, lengths_S, table_SM)
    return batch, torch.cat(positions), torch.cat(slots)


def least(
    run: Callable[[], None], layers: Layers, budget_s: float
) -> tuple[float, dict[str, float]]:
    """The least time of a run, after one to warm up, and that run's parts."""
    run()
    best, parts = float("inf"), layers.seconds
    until = time.perf_counter() + budget_s
    while time.perf_counter() < until:
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        if seconds < best:
            best, parts = seconds, layers.seconds
    return best, parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--context", type=int, default=160, help="tokens of each decode")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    context = arguments.context
    spec = AttentionSpec(
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        scale=HEAD_DIM**-0.5,
        page_size=PAGE_SIZE,
        dtype=dtype,
        device=CPU,
        max_context_tokens=8192,
    )
    backend = build(NoOptions(), spec)
    layers = Layers(dtype, num_pages=1 + max(16 * (2 * context // PAGE_SIZE + 1), 160))
    report: dict[str, object] = {"dtype": arguments.dtype, "threads": torch.get_num_threads()}

    def measure(name: str, rows: list[int], contexts: list[int], peer: float) -> None:
        batch, positions_T, slots_T = make_batch(rows, contexts)
        seconds, parts = least(
            lambda: layers.step(backend, batch, positions_T, slots_T), layers, arguments.seconds
        )
        rate = sum(rows) / seconds
        report[name] = {
            "ms": round(seconds * 1e3, 2),
            "tokens_per_s": round(rate),
            "ratio_to_vllm": round(rate / peer, 2),
            "ms_by_kind": {kind: round(s * 1e3, 2) for kind, s in parts.items()},
        }

    with torch.inference_mode():
        for size, peer in PEER_DECODE.items():
            measure(f"decode.{size}", [1] * size, [context] * size, peer)
        # Contexts as they are in serving: each sequence at another length.
        mixed = [context // 2 + index * context // 15 for index in range(16)]
        measure("decode.16 mixed", [1] * 16, mixed, PEER_DECODE[16])
        for tokens in (128, 2048):
            measure(f"prefill.{tokens}", [tokens], [tokens], PEER_PREFILL)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
