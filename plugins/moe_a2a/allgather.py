"""Every rank gets all rows; the exchange itself is in plugins.moe_a2a._gathered, for others too."""

from core.interfaces.moe_a2a import A2ASpec, ExpertLayout
from plugins.moe_a2a._gathered import GatherDispatcher
from plugins.moe_a2a._options import AllGatherOptions


class AllGatherDispatcher(GatherDispatcher):
    """The factory behind moe_a2a=allgather."""

    def __init__(self, options: AllGatherOptions, spec: A2ASpec) -> None:
        super().__init__(spec, ExpertLayout(options.layout))
