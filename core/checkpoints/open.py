"""From a model's files to the reader that its layers take their weights from."""

import torch

from core.checkpoints.formats import format_choice, make_format
from core.disk.progress import OnProgress
from core.interfaces.checkpoint import WeightGenerator
from core.interfaces.control import ModelFiles
from core.interfaces.model import ModelSpec
from core.interfaces.weights import OpenedWeights
from core.plugin.plugin_manager import PluginTable
from core.settings.config import ModelConfig
from core.weights.check import check_checkpoint
from core.weights.manifest import BLOCK
from core.weights.reader import CheckpointReader, ShapeReader


def open_weights(
    model: ModelConfig,
    files: ModelFiles,
    formats: PluginTable,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: OnProgress,
    spec: ModelSpec | None = None,
    rank_shapes: ShapeReader | None = None,
    model_shapes: ShapeReader | None = None,
) -> OpenedWeights:
    """The weights of one rank. Call `finish` once the model is built.

    `rank_shapes`: what this rank is going to take; it is read ahead. `model_shapes`: what all ranks
    take together (a build of the same model on one rank); the checkpoint is compared with it before
    anything is read. Without it a rank that keeps some experts only would call the others surplus.
    """
    total_bytes = rank_shapes.num_bytes if rank_shapes else 0
    format_ = make_format(formats, format_choice(model, files.weight_format))
    if isinstance(format_, WeightGenerator):
        return format_.generate(
            model, dtype=dtype, device=device, on_progress=on_progress, total_bytes=total_bytes
        )
    source = format_.open(files, dtype)
    block = (spec.quantization if spec else None) or BLOCK
    ignored = spec.ignored_tensors if spec else ()
    if model_shapes is not None:
        check_checkpoint(source.tensors(), model_shapes.manifest, block=block, ignored=ignored)
    return CheckpointReader(
        source,
        dtype,
        device,
        on_progress,
        block=block,
        ignored=ignored,
        expected=rank_shapes.manifest if rank_shapes else (),
        all_taken=model_shapes is None,
    )
