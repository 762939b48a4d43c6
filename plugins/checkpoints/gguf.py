"""Models in one GGUF file (core.interfaces.checkpoint.CheckpointFormat)."""

from pathlib import Path
from typing import TYPE_CHECKING

from core.interfaces.control import ModelFiles
from core.plugin.hookspecs import NoOptions

if TYPE_CHECKING:
    import torch

    from core.interfaces.weights import WeightSource


class GGUFFormat:
    """A file whose name ends in .gguf; it carries config and tokenizer."""

    needs = "a .gguf file"
    hub_files = ()  # a repository has a file for each way to quantise

    def __init__(self, options: NoOptions) -> None:
        pass

    def recognises(self, location: Path) -> bool:
        return location.suffix == ".gguf"

    def stands_in(self, location: Path) -> bool:
        return False

    def read(self, location: Path, *, with_weights: bool) -> ModelFiles:
        """Config and tokenizer are in the file itself, so it is read either way."""
        # Imported here: these need numpy, which a folder of safetensors does without.
        from plugins.checkpoints._gguf.config import (
            group_bits,
            hf_config,
            key_names,
            metadata_warnings,
        )
        from plugins.checkpoints._gguf.header import read_gguf
        from plugins.checkpoints._gguf.tokenizer import gguf_tokenizer_dir, splitting_warnings
        from plugins.checkpoints._gguf.tokens import read_tokens

        file = read_gguf(str(location))
        config = hf_config(file)
        tokens = read_tokens(file)
        return ModelFiles(
            hf_config=config,
            weight_files=[str(location)],
            weight_format="",
            tokenizer_dir=str(gguf_tokenizer_dir(file)),
            eos_ids=tokens.end_ids,
            default_sampling={},
            warnings=[*metadata_warnings(file), *tokens.warnings, *splitting_warnings(file)],
            key_names=key_names(file),
            group_bits=group_bits(file),
            num_tensors=len(file.tensors),
        )

    def open(self, files: ModelFiles, dtype: "torch.dtype") -> "WeightSource":
        from plugins.checkpoints._gguf.source import GGUFSource

        (path,) = files.weight_files
        return GGUFSource(path, dtype)
