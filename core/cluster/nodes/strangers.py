"""Those who came to a node's port and did not prove themselves yet: how many, how long, how loud.

Everybody on the network may connect there, from many addresses and as often as they like. What they
cost is bounded here: connections, time, and lines in the log. Reads no bytes.
"""

import math
import time
from collections import Counter, OrderedDict

from core.cluster.nodes.link import Link

HANDSHAKE_S = 5.0  # for a stranger to prove itself
MAX_STRANGERS = 64  # connections at a time
BURST_LINES = 8  # about strangers that may come at once
LINE_EVERY_S = 30.0  # on the average after that
MAX_REMEMBERED = 256  # addresses and reasons that were told and are not told again


class Strangers:
    """Connections on trial. The ends of their times are of `time.monotonic`."""

    def __init__(self) -> None:
        self._until_s: dict[Link, float] = {}  # in the order they came

    def add(self, link: Link) -> None:
        self._until_s[link] = time.monotonic() + HANDSHAKE_S

    def remove(self, link: Link) -> None:
        del self._until_s[link]

    def links(self) -> list[Link]:
        return list(self._until_s)

    def crowded_out(self) -> Link | None:
        """Who has to go before one more may come: the oldest of the address that has most, so that
        one machine with many connections does not keep a node from joining."""
        if len(self._until_s) < MAX_STRANGERS:
            return None
        numbers = Counter(link.peer_host for link in self._until_s)
        most = max(numbers.values())
        return next(link for link in self._until_s if numbers[link.peer_host] == most)

    @property
    def next_late_s(self) -> float:
        return min(self._until_s.values(), default=math.inf)

    def late(self) -> list[Link]:
        """Those whose time is over."""
        now = time.monotonic()
        return [link for link, until_s in self._until_s.items() if until_s <= now]

    @property
    def late_text(self) -> str:
        return f"it did not prove itself within {HANDSHAKE_S:g} s"


class RefusalLog:
    """Decides which refusals are worth a line: each address and reason once, some at once, then few
    a minute; the others are counted, and the next line tells how many they were."""

    def __init__(self) -> None:
        self._told: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._lines, self._lines_s = float(BURST_LINES), time.monotonic()
        self._untold = 0

    def count(self, number: int) -> None:
        """So many were refused of whom no more is known."""
        self._untold += number

    def line(self, host: str, reason: str, text: str) -> str | None:
        """`text` with what was left out before it; None: not now."""
        if (host, reason) in self._told:
            self._told.move_to_end((host, reason))
            self._untold += 1
            return None
        now = time.monotonic()
        self._lines = min(self._lines + (now - self._lines_s) / LINE_EVERY_S, float(BURST_LINES))
        self._lines_s = now
        if self._lines < 1:
            self._untold += 1
            return None
        self._lines -= 1
        self._told[host, reason] = None
        if len(self._told) > MAX_REMEMBERED:
            self._told.popitem(last=False)
        untold, self._untold = self._untold, 0
        return f"{text} ({untold} more were refused since the last such line)" if untold else text
