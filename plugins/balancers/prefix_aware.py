"""Requests go to the rank that has computed the beginning of their prompts, if it is not too busy.

Remembers prompts, not what ranks really keep.
"""

from collections import OrderedDict
from collections.abc import Sequence

from core.interfaces.balancer import BalancerSpec, RequestView
from core.interfaces.messages import EngineStats
from plugins.balancers._loads import ExpectedLoads
from plugins.balancers._options import PrefixAwareOptions


class PrefixAware(ExpectedLoads):
    """Implements core.interfaces.balancer.Balancer: the rank that was given the longest part of the
    prompt before, unless it is too busy: its load may be above the least by `most_extra_load` and
    by the tokens it need not compute again. `blocks_per_rank` bounds the memory."""

    def __init__(self, options: PrefixAwareOptions, spec: BalancerSpec) -> None:
        super().__init__(spec.num_ranks)
        self._options = options
        self._block_tokens = spec.block_tokens
        # By rank: hashes of prefixes, the least recently used first.
        self._known: list[OrderedDict[int, None]] = [OrderedDict() for _ in self.loads]

    def add(self, request: RequestView, gauges: Sequence[EngineStats]) -> int:
        prefixes = request.prefix_hashes()
        rank = self._choose(prefixes)
        known_tokens = self._num_known(rank, prefixes) * self._block_tokens
        self._remember(rank, prefixes)
        return self.assign(rank, request, request.num_prompt_tokens - known_tokens)

    def _choose(self, prefixes: Sequence[int]) -> int:
        least = self.least()
        base = self._num_known(least, prefixes)
        allowed = self.loads[least] * (1 + self._options.most_extra_load)
        best = (base, -self.loads[least], least)
        for rank, load in enumerate(self.loads):
            num_known = self._num_known(rank, prefixes)
            if num_known > base and load <= allowed + (num_known - base) * self._block_tokens:
                best = max(best, (num_known, -load, rank))
        return best[2]

    def _num_known(self, rank: int, prefixes: Sequence[int]) -> int:
        known = self._known[rank]
        for count, prefix in enumerate(prefixes):
            if prefix not in known:
                return count
        return len(prefixes)

    def _remember(self, rank: int, prefixes: Sequence[int]) -> None:
        known = self._known[rank]
        for prefix in reversed(prefixes):  # the longest is forgotten first
            known[prefix] = None
            known.move_to_end(prefix)
        while len(known) > self._options.blocks_per_rank:
            known.popitem(last=False)
