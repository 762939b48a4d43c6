"""Which kernel and which tile sizes for which shape: data in core/gpu_tools/tuned/<operation>.json.

A file holds a list of rows, e.g. {"device": "H100", "outputs": 4096, "inputs": 4096,
"max_rows": 16, "path": "skinny", "BLOCK_O": 32}. `device` is a key of tuned/devices.json, which
says what those devices are. A row applies to shapes that equal the keys it names, and to at most
`max_rows` rows; the one with the least `max_rows` that still suffices is taken. What was not
measured on a device, a shape or more rows of it, takes the rows of the nearest one of the same
compute capability. The programs that measured them are in benchmarks/.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

Choice = Mapping[str, Any]

FOLDER = Path(__file__).parent / "tuned"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TunedDevice:
    """What decides whether launches that were measured on one device suit another."""

    name: str  # part of the driver's name for it
    capability: tuple[int, int]
    multiprocessors: int


@lru_cache(maxsize=1)
def measured_devices() -> tuple[TunedDevice, ...]:
    """The devices that rows can be of."""
    return tuple(
        TunedDevice(name, tuple(facts["capability"]), facts["multiprocessors"])
        for name, facts in _read("devices.json").items()
    )


@lru_cache(maxsize=16)
def describe(device: torch.device) -> TunedDevice:
    """A device as its driver describes it; one without a driver is like no other."""
    if device.type != "cuda":
        return TunedDevice(device.type, (0, 0), 0)
    facts = torch.cuda.get_device_properties(device)
    return TunedDevice(facts.name, (facts.major, facts.minor), facts.multi_processor_count)


@lru_cache(maxsize=16)
def tables_for(device: TunedDevice) -> tuple[str, ...]:
    """Names of the devices whose rows suit `device`: its own first, then those of the same compute
    capability, the nearest number of multiprocessors first."""
    alike = [known for known in measured_devices() if known.capability == device.capability]

    def distance(known: TunedDevice) -> tuple[bool, int, str]:
        another = known.name not in device.name
        return another, abs(known.multiprocessors - device.multiprocessors), known.name

    return tuple(known.name for known in sorted(alike, key=distance))


def table_of(device: torch.device) -> str:
    """What rows that are measured on a device are said to be of. Raises LookupError where nothing
    is known of such devices."""
    described = describe(device)
    for name in tables_for(described):
        if name in described.name:
            return name
    raise LookupError(f"{described} is not in core/gpu_tools/tuned/devices.json: add it")


@lru_cache(maxsize=64)
def rows_of(operation: str, table: str) -> tuple[Choice, ...]:
    """The rows measured for an operation on the devices of one name, by rising `max_rows`; none
    where no file or no row speaks of it."""
    found = [row for row in _read(f"{operation}.json") if row["device"] == table]
    return tuple(sorted(found, key=lambda row: float(row["max_rows"])))


def choices(operation: str, device: torch.device, **shape: int) -> tuple[Choice, ...]:
    """What was measured for one shape, by rising `max_rows`; for when a kernel is prepared."""
    described = describe(device)
    found: list[Choice] = []
    for table in tables_for(described):
        most = found[-1]["max_rows"] if found else 0
        more = [
            row
            for row in rows_of(operation, table)
            if row["max_rows"] > most
            and all(row.get(key, value) == value for key, value in shape.items())
        ]
        if more and table not in described.name:
            _tell_borrowed(described.name, table)
        found += more
    return tuple(found)


def choose(found: tuple[Choice, ...], num_rows: int) -> Choice | None:
    """The row for so many rows, of what `choices` gave; None: nothing was measured that large."""
    return next((row for row in found if num_rows <= row["max_rows"]), None)


@lru_cache(maxsize=16)  # once is enough
def _tell_borrowed(device_name: str, table: str) -> None:
    log.info(
        "some kernels were not tuned on %s: they are launched as was best on %s "
        "(docs/performance.md says how a device is tuned)",
        device_name,
        table,
    )


def _read(file_name: str) -> Any:
    file = FOLDER / file_name
    return json.loads(file.read_text()) if file.is_file() else []
