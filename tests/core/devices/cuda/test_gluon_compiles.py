"""Gluon kernels compile for Hopper where there is no GPU, and fit in its shared memory.

They run in no interpreter: what they compute is tested on a GPU. The launches are those of the
code that serves, on CPU tensors.
"""

from pathlib import Path

import pytest

from tests.support.hopper import run_for_hopper

pytest.importorskip("triton")

SCRIPT = """
import types
torch.cuda.get_device_properties = lambda _: types.SimpleNamespace(multi_processor_count=132)

from core.devices.cuda.linear import gluon_gated
from core.gpu_tools.compile_ahead import rehearsal
from plugins.attention._triton_heads import prompt_gluon, prompt_gluon_kernels
from plugins.attention._triton_latent import gluon, gluon_kernels
from plugins.attention._triton_latent.splits import Splits
from core.testing import attention, latent_attention

def zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)

def gated(O, I):
    assert gluon_gated.takes(zeros(2 * O, I), None, None)
    gluon_gated.gated(zeros(2 * O, I))(zeros(300, I))

def prompts(H, G, cached, page_size):
    case = attention.Case(
        rows=(300, 129), cached=cached, num_heads=H, num_kv_heads=G, head_dim=128,
        page_size=page_size,
    )
    step = attention.make_step(case, torch.bfloat16, CPU)
    assert prompt_gluon.fits(step.spec)
    prompts = prompt_gluon.GluonPrompts(step.spec, step.spec.scale * 1.44, 132)
    plan = prompts.plan(step.batch)
    prompts.attend(plan, step.kv, step.q_THD, step.new, torch.empty_like(step.q_THD))

def latents(H):
    case = latent_attention.Case(
        rows=(1, 1), cached=(99, 0), page_size=64, num_heads=H, dims=(128, 64, 128, 512)
    )
    step = latent_attention.make_step(case, torch.bfloat16, CPU)
    assert gluon.fits(step.spec)
    schedule, workspace = torch.zeros((9, 9), dtype=torch.int32), torch.zeros(9 * H * 513)
    q_THC, q_THR = zeros(2, H, 512), zeros(2, H, 64)
    gluon.GluonKernel(step.spec, 0.1).attend(
        Splits(step.batch, schedule, workspace, 4, q_THC, q_THR, step.cache_BPZ, q_THC)
    )

with rehearsal(CPU, lambda *_: None, 2):
    gated(512, 256)
    prompts(8, 2, (0, 0), 64)
    prompts(8, 2, (70, 0), 64)
    prompts(8, 2, (70, 0), 16)
    latents(128)

for kernel in (
    gluon_gated.gated_kernel,
    prompt_gluon_kernels.prompt_kernel,
    gluon_kernels.latent_decode_kernel,
):
    compiled = list(kernel.device_caches[0][0].values())
    assert compiled, kernel
    for each in compiled:
        print(each.metadata.name, each.metadata.shared)
        assert each.metadata.shared <= 227 * 1024, "more shared memory than Hopper has"
"""


def test_kernels_compile_and_fit(tmp_path: Path) -> None:
    assert len(run_for_hopper(SCRIPT, tmp_path).splitlines()) == 5
