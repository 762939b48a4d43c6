"""The options of the all-to-all plugins, as `moe_a2a.<phase>.options` holds them. Free of torch."""

from dataclasses import dataclass

from core.errors import ConfigError
from core.settings.config import require_choice, require_range

LAYOUTS = ("contiguous", "batched")
ALL_LAYOUTS = ("routed", *LAYOUTS)
EXCHANGES = ("auto", "fixed", "counted")
LOW_LATENCY_ROWS = 1024  # DeepEP counts a rank's rows for one expert below this (FINISHED_SUM_TAG)


@dataclass(slots=True, kw_only=True)
class AllGatherOptions:
    """Of `allgather`."""

    # routed: the experts' kernels group and sum by themselves, as on one rank. The others, to check
    # kernels of those layouts: contiguous rows, and batched ones as DeepEP's low latency gives.
    layout: str = "routed"

    def __post_init__(self) -> None:
        require_choice("moe_a2a.<phase>.options.layout", self.layout, ALL_LAYOUTS)


@dataclass(slots=True, kw_only=True)
class EmulatedOptions:
    """Of `emulated`."""

    # batched: as DeepEP's low-latency mode leaves rows; routed: as allgather, symm_mem and nccl do.
    layout: str = "contiguous"
    fp8: bool = True  # rows travel as float8 where the experts read float8: half the bytes
    seed: int = 0  # of the experts that rows are taken to have come for

    def __post_init__(self) -> None:
        require_choice("moe_a2a.<phase>.options.layout", self.layout, ALL_LAYOUTS)


@dataclass(slots=True, kw_only=True)
class NcclOptions:
    """Of `nccl`."""

    fp8: bool = True  # rows travel as float8 where the experts read float8: half the bytes
    # counted: a row goes to the ranks of its experts, and the host waits for counts in every layer.
    # fixed: to all ranks, in sizes known before a step. auto: fixed on GPUs in decode steps, and in
    # others where that sends at most twice the bytes.
    exchange: str = "auto"

    def __post_init__(self) -> None:
        require_choice("moe_a2a.<phase>.options.exchange", self.exchange, EXCHANGES)


@dataclass(slots=True, kw_only=True)
class SymmMemOptions:
    """Of `symm_mem`."""

    fp8: bool = True  # rows travel as float8 where the experts read float8: half the bytes
    buffer_mib: int = 256  # of each rank and phase; steps with more rows go as allgather has them

    def __post_init__(self) -> None:
        require_range("moe_a2a.<phase>.options.buffer_mib", self.buffer_mib, 1, 65536)


@dataclass(slots=True, kw_only=True)
class DeepEPOptions:
    """Of `deepep`."""

    fp8: bool = True  # rows travel as float8 where the experts read float8: half the bytes
    num_sms: int = 20  # multiprocessors that normal mode's kernels take from the experts
    # Rows of a rank that low-latency mode's buffers hold; None: the most a decode step can have.
    low_latency_max_rows: int | None = None

    def __post_init__(self) -> None:
        require_range("moe_a2a.<phase>.options.num_sms", self.num_sms, 2)
        if self.num_sms % 2 != 0:
            raise ConfigError(
                f"moe_a2a.<phase>.options.num_sms={self.num_sms}: DeepEP takes multiprocessors in "
                "pairs; give an even number"
            )
        require_range(
            "moe_a2a.decode.options.low_latency_max_rows",
            self.low_latency_max_rows,
            1,
            LOW_LATENCY_ROWS,
        )
