"""The options of the communication plugins, as `comm.<axis>.options` holds them. Free of torch."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class SymmMemOptions:
    """Of `symm_mem`."""

    # Whether the all-reduce of a step of few rows adds to the residual and normalises in the same
    # launch.
    fuse_norm: bool = True
