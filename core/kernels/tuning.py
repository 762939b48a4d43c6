"""Which kernel and which tile sizes for which shape: data in core/kernels/tuned/<operation>.json.

A file holds a list of rows, e.g. {"device": "H100", "outputs": 4096, "inputs": 4096,
"max_rows": 16, "path": "skinny", "BLOCK_O": 32}. A row applies to devices whose name contains
`device`, to shapes
that equal the keys it names, and to at most `max_rows` rows; the one with the least `max_rows`
that still suffices is taken. The programs that measured them are in benchmarks/.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

import torch

Choice = Mapping[str, Any]


@lru_cache(maxsize=64)
def rows_of(operation: str, device_name: str) -> tuple[Choice, ...]:
    """The rows measured for an operation on a device, by rising `max_rows`; none where no file or
    no row speaks of it."""
    file = resources.files("core.kernels") / "tuned" / f"{operation}.json"
    if not file.is_file():
        return ()
    found = [row for row in json.loads(file.read_text()) if row["device"] in device_name]
    return tuple(sorted(found, key=lambda row: float(row["max_rows"])))


def device_name(device: torch.device) -> str:
    """As the driver gives it, e.g. "NVIDIA H100 80GB HBM3"; the type where there is no driver."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choices(operation: str, device: torch.device, **shape: int) -> tuple[Choice, ...]:
    """What was measured for one shape, by rising `max_rows`; for when a kernel is prepared."""
    return tuple(
        row
        for row in rows_of(operation, device_name(device))
        if all(row.get(key, value) == value for key, value in shape.items())
    )


def choose(found: tuple[Choice, ...], num_rows: int) -> Choice | None:
    """The row for so many rows, of what `choices` gave; None: nothing was measured that large."""
    return next((row for row in found if num_rows <= row["max_rows"]), None)
