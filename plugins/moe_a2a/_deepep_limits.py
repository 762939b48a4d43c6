"""What DeepEP can do, and the sentences for what it can't. Free of torch and of the package.

The numbers are those of `sgl-deep-ep` 0.1.0 (DeepEP V1): sizes are compiled into its kernels
(`internode_ll::dispatch<fp8, ue8m0, hidden>`, `combine<logfmt, hidden, topk, unroll>`,
`intranode::dispatch<ranks, ...>`, `internode::combine<low latency, rdma ranks, ...>`).
"""

import importlib.util

from core.settings.config import AppConfig
from plugins.moe_a2a._options import LOW_LATENCY_ROWS

INSTALL = "pip install 'nodeweave[deepep]' (the package sgl-deep-ep, for CUDA 13)"
GPUS_OF_A_NODE = 8  # normal mode numbers the ranks of a node by this many
NORMAL_RANKS = (2, 4, 8, 16, 32, 64, 128, 144, 160)
NORMAL_TOP_K = 32
LOW_LATENCY_HIDDEN = (2048, 2560, 4096, 5120, 6144, 7168, 8192)
LOW_LATENCY_TOP_K = 11
BLOCK = 128  # columns that hidden sizes are multiples of


def config_problems(config: AppConfig, phase: str) -> list[str]:
    """What speaks against deepep in a resolved configuration, before any process starts."""
    key, ep = f"moe_a2a.{phase}", config.parallel.ep
    instead = f"set {key}=auto" if ep == 1 else f"set {key}=nccl"
    problems = []
    if config.engine.device == "cpu":
        problems.append(f"{key}=deepep needs engine.device=cuda, but it is 'cpu'; {instead}")
    elif importlib.util.find_spec("deep_ep") is None:
        problems.append(
            f"{key}=deepep needs the package deep_ep, which is not installed; {INSTALL}, or "
            f"{instead}"
        )
    if config.model.dtype in ("float32", "float16"):
        problems.append(
            f"{key}=deepep carries bfloat16 rows, but model.dtype={config.model.dtype}; set "
            f"model.dtype=bfloat16, or {instead}"
        )
    if phase == "prefill" and ep in NORMAL_RANKS and config.launch.nnodes > 1:
        wanted = GPUS_OF_A_NODE * config.launch.nnodes
        if ep != wanted:
            problems.append(
                f"{key}=deepep joins {GPUS_OF_A_NODE} GPUs of each node, so launch.nnodes="
                f"{config.launch.nnodes} needs parallel.ep={wanted}, but it is {ep}; change one of "
                f"them, or {instead}"
            )
    shape = config.model.shape or {}
    problems += size_problems(
        phase,
        ep=ep,
        hidden_size=shape.get("hidden_size"),
        top_k=shape.get("num_experts_per_tok"),
        rows=None,
    )
    return problems


def size_problems(
    phase: str, *, ep: int, hidden_size: int | None, top_k: int | None, rows: int | None
) -> list[str]:
    """Sizes that DeepEP has no kernels or buffers for; None where not known yet. `rows`: the most
    of one rank in a step of this phase."""
    key = f"moe_a2a.{phase}"
    problems = []
    if ep == 1:
        return [f"{key}=deepep needs parallel.ep of at least 2, but it is 1; set {key}=auto"]
    if phase == "prefill":
        if ep not in NORMAL_RANKS:
            problems.append(
                f"{key}=deepep does not connect parallel.ep={ep} ranks; allowed: "
                f"{_listed(NORMAL_RANKS)}; or set {key}=nccl"
            )
        if hidden_size is not None and hidden_size % BLOCK != 0:
            problems.append(
                f"{key}=deepep needs a hidden size that is a multiple of {BLOCK}, but the model's "
                f"is {hidden_size}; set {key}=nccl"
            )
        if top_k is not None and top_k > NORMAL_TOP_K:
            problems.append(
                f"{key}=deepep sends a token to at most {NORMAL_TOP_K} experts, but the model "
                f"chooses {top_k}; set {key}=nccl"
            )
        return problems
    if hidden_size is not None and hidden_size not in LOW_LATENCY_HIDDEN:
        problems.append(
            f"{key}=deepep (low-latency mode) has no kernel for the model's hidden size of "
            f"{hidden_size}; it has for {_listed(LOW_LATENCY_HIDDEN)}; set {key}=nccl"
        )
    if top_k is not None and top_k > LOW_LATENCY_TOP_K:
        problems.append(
            f"{key}=deepep (low-latency mode) sends a token to at most {LOW_LATENCY_TOP_K} "
            f"experts, but the model chooses {top_k}; set {key}=nccl"
        )
    if rows is not None and rows > LOW_LATENCY_ROWS:
        problems.append(
            f"{key}=deepep (low-latency mode) carries at most {LOW_LATENCY_ROWS} rows of a rank in "
            f"a step, but a decode step can have {rows}; lower engine.max_running_requests, or set "
            f"{key}=nccl"
        )
    return problems


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(str(value) for value in values)
