"""Work beside the stream of a step on a GPU: a second stream that starts after what was launched so
far, and that the first one waits for later. Both may be captured in one CUDA graph.

What the work allocates is taken from the second stream's memory, and comes free for later work on
it, which starts after all that was launched on the first stream before: a result may be used until
the next `begin`. Knows nothing of what the work is.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class SideStream:
    """One work at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Ahead of kernels of the first one that find no room, behind which its own would wait.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def begin(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
        """Launches `work(x)`. What is returned has the current stream wait for it, and must be
        called before `x` is let go."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            result = work(x)

        def join() -> Tensor:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            return result

        return join
