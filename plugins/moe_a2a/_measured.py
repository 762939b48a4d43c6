"""Which all-to-all was fastest, by ranks, links and rows: data, as benchmarks.gpu_a2a wrote it.

core/gpu_tools/tuned/moe_a2a.json holds rows such as {"device": "H200", "one_host": true, "ranks":
2, "hidden": 7168, "fp8": true, "rows": 64, "us": {"allgather": 41.0, "symm_mem": 23.5}}:
microseconds of dispatch and combine of one layer, in a graph, with so many rows on each rank. Free
of torch.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

Row = Mapping[str, Any]


@lru_cache(maxsize=1)
def measured_rows() -> tuple[Row, ...]:
    """All rows; none where nothing was measured."""
    file = resources.files("core.gpu_tools") / "tuned" / "moe_a2a.json"
    return tuple(json.loads(file.read_text())) if file.is_file() else ()


def fastest(
    rows: Sequence[Row],
    *,
    ranks: int,
    one_host: bool,
    least_rows: int,
    most_rows: int,
    hidden_size: int | None,
    names: Collection[str],
) -> str | None:
    """Of `names` the one that is fastest over all steps of so many rows of a rank, sizes counting
    alike; None where not two of them were measured. Of several hidden sizes the nearest one
    counts, and where no size lies between, the nearest below or the least."""
    found = [row for row in rows if row["ranks"] == ranks and row["one_host"] == one_host]
    found = [row for row in found if len(names & row["us"].keys()) > 1]
    if not found:
        return None
    if hidden_size is not None:
        wanted = hidden_size
        nearest = min((row["hidden"] for row in found), key=lambda hidden: abs(hidden - wanted))
        found = [row for row in found if row["hidden"] == nearest]
    sizes = sorted({row["rows"] for row in found})
    below = [size for size in sizes if size <= most_rows] or sizes[:1]
    between = [size for size in below if size >= least_rows] or below[-1:]
    found = [row for row in found if row["rows"] in between]
    known = set(names).intersection(*(row["us"] for row in found))

    def slowness(name: str) -> float:
        """How far behind the fastest, in logarithms."""
        return sum(math.log(row["us"][name] / min(row["us"][n] for n in known)) for row in found)

    return min(sorted(known), key=slowness) if len(known) > 1 else None
