"""What a format of checkpoints does: recognise a place, read what is said of its model, open it."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from core.interfaces.control import ModelFiles

if TYPE_CHECKING:  # which import torch: the parent only finds and reads
    import torch

    from core.interfaces.weights import WeightSource


class CheckpointFormat(Protocol):
    """A way in which models lie on a disk. Its module imports no torch until `open` is called."""

    needs: str  # what a place must be, for the error where no format takes it: "a .gguf file"

    def recognises(self, location: Path) -> bool:
        """Whether an existing folder or file holds weights of this format. Cheap; never raises."""
        ...

    def stands_in(self, location: Path) -> bool:
        """Whether to `read` a place that no format recognises: for a config without weights, or
        for an error that says what is missing."""
        ...

    def read(self, location: Path, *, with_weights: bool) -> ModelFiles:
        """The model's config, weight files, tokenizer, and bits of quantised matrices.

        `weight_format` is ignored: it is set to the name the format is known by. Without weights
        (dummy ones are served) damaged or missing weight files are no error. Raises ModelError.
        """
        ...

    def open(self, files: ModelFiles, dtype: "torch.dtype") -> "WeightSource":
        """The weights of `files`, which `read` gave; `dtype`: the model's, for formats that
        convert as they read. Raises ModelError."""
        ...
