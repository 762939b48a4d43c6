"""Ranks as threads: core.testing.ranks, by its old name."""

from core.testing.ranks import (
    ThreadCommunicator,
    plan_comms,
    run_ranks,
    thread_communicators,
    tp_comms,
)

__all__ = ["ThreadCommunicator", "plan_comms", "run_ranks", "thread_communicators", "tp_comms"]
