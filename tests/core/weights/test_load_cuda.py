"""Loading onto a GPU gives what loading on the CPU gives."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.interfaces.weights import BlockFp8, Shard, WeightReader
from core.weights.reader import CheckpointReader, ShapeReader
from plugins.checkpoints._dummy_reader import DummyReader
from plugins.checkpoints._safetensors.source import SafetensorsSource
from tests.support.models import CPU, ignore_progress

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")
SHAPE = (1024, 5120)  # larger than a buffer in float32
SHARDS = (None, Shard(0, 1, 4), Shard(1, 3, 4))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(4):
        values = torch.randn(SHAPE, generator=generator)
        tensors[f"{i}.plain"] = values
        tensors[f"{i}.blocks"] = (values * 50).to(torch.float8_e4m3fn)
        tensors[f"{i}.blocks_scale_inv"] = torch.rand(8, 40, generator=generator)
    path = tmp_path_factory.mktemp("cuda") / "model.safetensors"
    save_file(tensors, path)
    return path


def build(reader: WeightReader) -> list[torch.Tensor]:
    parts: list[torch.Tensor] = []
    for i in range(4):
        for shard in SHARDS:
            parts.append(reader.take(f"{i}.plain", SHAPE, shard))
            parts.append(reader.take(f"{i}.plain", SHAPE, shard, torch.float32))
            parts.append(reader.take(f"{i}.blocks", SHAPE, shard))
            blocks: BlockFp8 = reader.take_blocks(f"{i}.blocks", SHAPE, shard)
            parts += [blocks.values_OI.view(torch.uint8), blocks.scales]
    return parts


def test_gpu_weights_are_those_of_the_cpu(path: Path) -> None:
    shapes = ShapeReader(torch.bfloat16)
    build(shapes)
    loaded = {}
    for device in (CPU, CUDA):
        reader = CheckpointReader(
            SafetensorsSource([str(path)]),
            torch.bfloat16,
            device,
            ignore_progress,
            expected=shapes.manifest,
        )
        loaded[device] = build(reader)
        reader.finish()
    for cpu, gpu in zip(loaded[CPU], loaded[CUDA], strict=True):
        assert gpu.is_cuda
        assert torch.equal(gpu.cpu(), cpu)


def test_dummy_weights_are_those_of_the_cpu() -> None:
    parts = [build(DummyReader(0, torch.bfloat16, d, ignore_progress)) for d in (CPU, CUDA)]
    for cpu, gpu in zip(*parts, strict=True):
        assert torch.equal(gpu.cpu(), cpu)
