"""What a format of checkpoints does: recognise a place, read what is said of its model, open it.

Or, in place of a format, what makes weights that no file holds.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from core.interfaces.control import ModelFiles
from core.settings.config import ModelConfig

if TYPE_CHECKING:  # which import torch: the parent only finds and reads
    import torch

    from core.interfaces.weights import OpenedWeights, WeightSource


class CheckpointFormat(Protocol):
    """A way in which models lie on a disk. Its module imports no torch until `open` is called."""

    needs: str  # what a place must be, for the error where no format takes it: "a .gguf file"
    # The weight files of a repository on the Hugging Face Hub: patterns of names, "*.safetensors".
    # What stands beside weights is fetched anyway. (): nothing is, for this format.
    hub_files: Sequence[str]

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
        (they are made up) damaged or missing weight files are no error. Raises ModelError.
        """
        ...

    def open(self, files: ModelFiles, dtype: "torch.dtype") -> "WeightSource":
        """The weights of `files`, which `read` gave; `dtype`: the model's, for formats that
        convert as they read. Raises ModelError."""
        ...


@runtime_checkable
class WeightGenerator(Protocol):
    """Makes weights up, for a model of which there is a shape only (`model.load_format=dummy`).

    Config and tokenizer are those of the format that the model's place is in; or, without a place,
    `model.shape` and a tokenizer with a token for each byte.
    """

    def generate(
        self,
        model: ModelConfig,
        *,
        dtype: "torch.dtype",
        device: "torch.device",
        on_progress: Callable[[str, int, int, str], None],
        total_bytes: int,
    ) -> "OpenedWeights":
        """The weights of one rank, on `device`. What it takes has `total_bytes` (0: not known), of
        which `on_progress` (task, done, total, "B") is told at most ten times a second."""
        ...
