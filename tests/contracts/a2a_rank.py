"""One rank of the moe_a2a contract over real gloo processes: takes every dispatcher through some
cases, saves what it got.

    python -m tests.contracts.a2a_rank RANK SIZE RENDEZVOUS RESULT.npz
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from core.hookspecs import NoOptions
from core.parallel.mesh import open_mesh
from core.parallel.plan import Plan
from plugins.comm.gloo import GlooBackend
from tests.contracts.a2a_backends import BACKENDS, build
from tests.contracts.a2a_cases import DEFAULT, Case, run_steps

CASES = [
    DEFAULT,
    Case(counts="one_empty", top_k=8, redundant=4, dtype=torch.bfloat16),
    Case(counts="one_has_most", routing="padded", dtype=torch.bfloat16, fp8=True),
    Case(counts="all_empty"),
]


def main() -> None:
    """Write this rank's results."""
    rank, size, rendezvous, path = sys.argv[1:]
    torch.set_num_threads(1)
    mesh = open_mesh(
        Plan(dp=int(size), ep=int(size)),
        int(rank),
        torch_backends={"ep": "gloo"},
        rendezvous=rendezvous,
        timeout_s=60.0,
    )
    backend = GlooBackend(NoOptions())
    results = {}
    for name, parameters in BACKENDS.items():
        for case in CASES:
            if int(size) in parameters.sizes and parameters.can(case):
                comm = backend.communicator(mesh.group("ep"))
                dispatcher = build(name, case, comm)
                for step, out in enumerate(
                    run_steps(case, dispatcher, comm, parameters.hidden_size)
                ):
                    results[f"{name}/{case}/{step}"] = out.double().numpy()
    mesh.close()
    with Path(path).open("wb") as file:
        np.savez(file, **results)


if __name__ == "__main__":
    main()
    os._exit(0)  # results are written; gloo's threads may still be closing sockets
