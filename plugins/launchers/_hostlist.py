"""Slurm's short form of host names, "node[01-03,7],gpu[1-2]-ib[0-1]", into the names. Pure.

Grammar: names separated by commas; a name is text and bracketed lists of numbers and ranges. The
width of a range's first number is kept with leading zeros. Of several brackets the last varies
fastest. Source: "Slurm hostlist expressions" in Slurm's documentation (`man scontrol`, show
hostnames).
"""

import itertools
import re

MAX_HOSTS = 65536  # of one list: the environment could ask for any number
_ITEM = re.compile(r"(?:[^\[\],\s]|\[[^\[\]\s]*\])+")
_PART = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def expand(text: str) -> list[str]:
    """Every name, in Slurm's order. Raises ValueError, naming the part that can't be read."""
    hosts: list[str] = []
    position = 0
    while True:
        item = _ITEM.match(text, position)
        if item is None:
            raise ValueError(f"can't read {text[position:]!r} in {text!r}")
        hosts += _expand_item(item.group(), MAX_HOSTS - len(hosts))
        position = item.end()
        if position == len(text):
            return hosts
        if text[position] != ",":
            raise ValueError(f"can't read {text[position:]!r} in {text!r}")
        position += 1


def _expand_item(item: str, most: int) -> list[str]:
    """The names of one item between commas."""
    choices = [
        [plain] if plain else _numbers(listed, most) for listed, plain in _PART.findall(item)
    ]
    total = 1
    for choice in choices:
        total *= len(choice)
    if total > most:
        raise ValueError(f"{item!r} stands for too many hosts; at most {MAX_HOSTS} are read")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _numbers(listed: str, most: int) -> list[str]:
    """What stands between brackets, each number with its zeros."""
    found: list[str] = []
    for part in listed.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"can't read {part!r} in [{listed}]")
        first, last = match.group(1), match.group(2) or match.group(1)
        if int(last) < int(first):
            raise ValueError(f"{part!r} in [{listed}] runs backwards")
        if int(last) - int(first) >= most - len(found):
            raise ValueError(f"[{listed}] stands for too many hosts; at most {MAX_HOSTS} are read")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found
