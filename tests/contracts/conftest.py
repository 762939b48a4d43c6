"""Settings of the contract suites that must hold before Triton is imported."""

import os

import torch

# Without a GPU Triton's kernels run in its interpreter, which is chosen when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
