"""One rank of the moe_a2a contract in a process of its own: takes every dispatcher through some
cases, saves what it got.

    python -m tests.contracts.a2a_rank BACKEND RANK SIZE RENDEZVOUS RESULT.npz

BACKEND is gloo, on the CPU, or nccl, on as many GPUs as ranks.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from core.parallel.mesh import open_mesh
from core.parallel.plan import Plan
from core.plugin.hookspecs import NoOptions
from core.testing.moe_a2a import CPU, DEFAULT, Case, run_steps
from plugins.comm.gloo import GlooBackend
from plugins.comm.nccl import NcclBackend
from tests.contracts.a2a_backends import BACKENDS, build

CASES = [
    DEFAULT,
    Case(counts="one_empty", top_k=8, redundant=4, dtype=torch.bfloat16),
    Case(counts="one_has_most", routing="padded", dtype=torch.bfloat16, fp8=True),
    Case(counts="all_empty"),
]


def dispatchers_over(backend: str, size: int) -> list[str]:
    """Those that so many ranks are run with; DeepEP's double is of the CPU."""
    return [
        name
        for name, parameters in BACKENDS.items()
        if size in parameters.sizes and (backend == "gloo" or not name.startswith("deepep"))
    ]


def main() -> None:
    """Write this rank's results."""
    backend, rank, size, rendezvous, path = sys.argv[1:]
    torch.set_num_threads(1)
    device = CPU
    if backend == "nccl":
        device = torch.device("cuda", int(rank))
        torch.cuda.set_device(device)
    mesh = open_mesh(
        Plan(dp=int(size), ep=int(size)),
        int(rank),
        torch_backends={"ep": backend},
        rendezvous=rendezvous,
        timeout_s=60.0,
        device=device,
    )
    made = {"gloo": GlooBackend, "nccl": NcclBackend}[backend](NoOptions())
    results = {}
    for name in dispatchers_over(backend, int(size)):
        parameters = BACKENDS[name]
        for case in CASES:
            if parameters.can(case):
                comm = made.communicator(mesh.group("ep"))
                dispatcher = build(name, case, comm, device)
                for step, out in enumerate(
                    run_steps(case, dispatcher, comm, parameters.hidden_size, device)
                ):
                    results[f"{name}/{case}/{step}"] = out.double().numpy()
    mesh.close()
    with Path(path).open("wb") as file:
        np.savez(file, **results)


if __name__ == "__main__":
    main()
    os._exit(0)  # results are written; gloo's threads may still be closing sockets
