"""What the memory and the matrix units of a device allow a step: floors to compare times with.

`Sizes` is arithmetic on a model's shape; `measure_device` takes the two ceilings from the device
itself. A step reads every weight that some row needs once, and the cache of every sequence:

    t = max((weights + batch * context * kv_bytes) / bandwidth, 2 * parameters * rows / flops)

Experts are counted as uniform random routing chooses them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import gpu_cells as cells

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Measured ceilings: bytes read plus bytes written, and matrix products."""

    name: str
    bytes_per_s: float
    bf16_flops: float
    fp8_flops: float | None  # None: torch has no fp8 product there

    def describe(self) -> dict[str, Any]:
        """Plain values for a JSON line."""
        return {
            "device": self.name,
            "copy_gb_s": round(self.bytes_per_s / GIGA),
            "bf16_tflops": round(self.bf16_flops / TERA),
            "fp8_tflops": round(self.fp8_flops / TERA) if self.fp8_flops else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes and parameters of a model on one device. An expert counts in the MoE layers."""

    weight_bytes: float  # all that a step reads, whatever its rows, without routed experts
    parameters: float  # the same, counted
    expert_bytes: float  # of one routed expert of one layer
    expert_parameters: float
    num_experts: int = 0
    top_k: int = 0
    num_moe_layers: int = 0
    kv_token_bytes: float = 0.0  # of one token in all layers
    # Arithmetic of attention for one query and one cached token, in all layers.
    attention_flops: float = 0.0
    fp8: bool = False

    def distinct_experts(self, rows: float) -> float:
        """Experts of a layer that `rows` rows are expected to choose between them."""
        return cells.distinct_experts(self.num_experts, self.top_k, rows)

    def step_bytes(self, rows: float, context_tokens: float) -> float:
        """Read by a step of `rows` rows that see `context_tokens` cached tokens between them."""
        experts = self.num_moe_layers * self.distinct_experts(rows) * self.expert_bytes
        return self.weight_bytes + experts + context_tokens * self.kv_token_bytes

    def row_flops(self) -> float:
        """Arithmetic of one row in all matrices."""
        active = self.num_moe_layers * self.top_k * self.expert_parameters
        return 2 * (self.parameters + active)

    def decode_s(self, batch: int, context_tokens: float, device: Device) -> float:
        """Seconds of a decode step; `context_tokens` is the sum over the batch."""
        flops = device.fp8_flops if self.fp8 and device.fp8_flops else device.bf16_flops
        return max(
            self.step_bytes(batch, context_tokens) / device.bytes_per_s,
            self.row_flops() * batch / flops,
        )

    def prefill_s(self, batch: int, tokens: int, device: Device) -> float:
        """Seconds of computing `batch` prompts of `tokens`, whatever the steps."""
        flops = device.fp8_flops if self.fp8 and device.fp8_flops else device.bf16_flops
        # Only the last row of a prompt goes through the head, which is little of the whole. The
        # last layer's MLP, which needs no more rows than the head, is counted with all of them.
        causal = batch * tokens * (tokens + 1) / 2 * self.attention_flops
        return self.row_flops() * batch * tokens / flops + causal / device.bf16_flops


def sizes_of(shape: Mapping[str, Any]) -> Sizes:
    """The sizes of a config.json: Llama, Qwen3, Qwen3-MoE and DeepSeek-V3 kinds, in bfloat16 or
    float8 blocks."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads = shape["num_attention_heads"]
    fp8 = "quantization_config" in shape
    width = 1 if fp8 else 2  # bytes of a weight; the scales are a 4,096th
    if "kv_lora_rank" in shape:
        attention, kv_values, attention_flops = _latent(shape)
    else:
        head_dim = shape.get("head_dim") or hidden // heads
        kv_heads = shape["num_key_value_heads"]
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        kv_values = 2 * kv_heads * head_dim
        attention_flops = 4 * heads * head_dim
    num_experts = shape.get("n_routed_experts") or shape.get("num_experts") or 0
    num_moe = layers - shape.get("first_k_dense_replace", 0) if num_experts else 0
    mlp = 3 * hidden * shape["intermediate_size"]
    expert = 3 * hidden * shape.get("moe_intermediate_size", 0)
    shared = shape.get("n_shared_experts", 0) * expert
    layer_weights = layers * attention + (layers - num_moe) * mlp + num_moe * shared
    plain = num_moe * num_experts * hidden + shape["vocab_size"] * hidden  # gates and head
    return Sizes(
        weight_bytes=layer_weights * width + plain * 2,
        parameters=layer_weights + plain,
        expert_bytes=expert * width,
        expert_parameters=expert,
        num_experts=num_experts,
        top_k=shape.get("num_experts_per_tok", 0),
        num_moe_layers=num_moe,
        kv_token_bytes=layers * kv_values * 2,
        attention_flops=layers * attention_flops,
        fp8=fp8,
    )


def _latent(shape: Mapping[str, Any]) -> tuple[int, int, int]:
    """(parameters of a layer, cached values of a token, flops of a query and a key) of MLA."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    latent, rope = shape["kv_lora_rank"], shape["qk_rope_head_dim"]
    nope, value = shape["qk_nope_head_dim"], shape["v_head_dim"]
    q_rank = shape.get("q_lora_rank")
    q = heads * (nope + rope)
    queries = hidden * q_rank + q_rank * q if q_rank else hidden * q
    parameters = (
        queries
        + hidden * (latent + rope)
        + latent * heads * (nope + value)
        + heads * value * hidden
    )
    return parameters, latent + rope, 2 * heads * (nope + rope + value)


def measure_device() -> Device:
    """Ceilings of the current CUDA device; takes about half a second."""
    import torch

    bytes_per_s = _copy_rate(2 * 1024**3)
    n = 8192
    a = torch.randn(n, n, dtype=torch.bfloat16, device="cuda")
    bf16_s = _median_s(lambda: torch.mm(a, a))
    fp8_s = _fp8_product_s(a)
    device = Device(
        name=torch.cuda.get_device_name(),
        bytes_per_s=bytes_per_s,
        bf16_flops=2 * n**3 / bf16_s,
        fp8_flops=2 * n**3 / fp8_s if fp8_s else None,
    )
    torch.cuda.empty_cache()
    return device


def _copy_rate(num_bytes: int) -> float:
    import torch

    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * num_bytes / _median_s(lambda: target.copy_(source))


def _fp8_product_s(like: Any) -> float | None:
    import torch

    if torch.cuda.get_device_capability() < (8, 9):
        return None
    a = like.to(torch.float8_e4m3fn)
    b = a.t().contiguous().t()
    one = torch.ones((), device=like.device)
    return _median_s(lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16))


def _median_s(work: Callable[[], object], repeats: int = 15) -> float:
    import torch

    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times[3:])[repeats // 2]
