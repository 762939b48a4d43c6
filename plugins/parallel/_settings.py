"""What plans say about their settings: which contradict a plan, and which sizes don't divide.

Shared by the plans of this package. Knows nothing of models.
"""

from core.settings.config import ParallelConfig


def divisor_problems(key: str, size: int | None, parallel: ParallelConfig) -> list[str]:
    """At most one sentence: why `size` ranks can't be a part of a replica's `parallel.tp`."""
    if size is None or parallel.tp % size == 0:
        return []
    allowed = [str(n) for n in range(1, parallel.tp + 1) if parallel.tp % n == 0]
    return [
        f"{key}={size} does not divide parallel.tp={parallel.tp}, the ranks of a replica; "
        f"allowed: {', '.join(allowed)}"
    ]


def absent_problems(plan: str, absent: dict[str, tuple[object, object, str]]) -> list[str]:
    """One sentence for each setting (key: value, neutral value, what it would be) that `plan` has
    no use for and that is not neutral."""
    return [
        f"{key}={shown(value)}: the plan {plan!r} has no {what}; set {key}={shown(neutral)}, or "
        "another parallel.plan"
        for key, (value, neutral, what) in absent.items()
        if value != neutral
    ]


def shared_problems(parallel: ParallelConfig) -> list[str]:
    """Settings that can't hold together under any plan, one sentence each."""
    problems = []
    if parallel.ep == 1:
        experts_apart = "experts on different ranks: set parallel.ep above 1, or"
        if parallel.redundant_experts > 0:
            problems.append(
                f"parallel.redundant_experts={parallel.redundant_experts} needs {experts_apart} "
                "parallel.redundant_experts=0"
            )
        if parallel.eplb.interval_steps > 0:
            problems.append(
                f"parallel.eplb.interval_steps={parallel.eplb.interval_steps} needs "
                f"{experts_apart} parallel.eplb.interval_steps=0"
            )
        if parallel.eplb.load_file is not None:
            problems.append(
                f"parallel.eplb.load_file={parallel.eplb.load_file} needs {experts_apart} "
                "parallel.eplb.load_file=null"
            )
    if parallel.dp_lm_head and parallel.dp_attention == 1:
        problems.append(
            "parallel.dp_lm_head=true needs ranks with rows of their own: set "
            "parallel.dp_attention above 1, or parallel.dp_lm_head=false"
        )
    return problems


def shown(value: object) -> str:
    """A value as it is written on the command line."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
