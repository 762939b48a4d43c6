"""Records device work as CUDA graphs and replays it. Knows nothing of what the work is."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[], tuple[Tensor, Tensor]]
Replay = Callable[[], tuple[Tensor, Tensor]]  # results hold until anything is replayed again


class Recorder(Protocol):
    """Records pieces of work that run one after the other, never two at a time."""

    def record(self, work: Work) -> Replay:
        """Run the work, then record it. It must not wait for the device."""
        ...

    def held_bytes(self) -> int:
        """Memory of the device that is taken."""
        ...


class CudaRecorder:
    """CUDA graphs whose memory is shared: what one leaves the next may overwrite."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Replay:
        """Runs it once to compile and to set libraries up, on the stream that is captured.

        Without torch.cuda.graph, whose collection of garbage and emptied caches cost more than
        the capture."""
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            work()
            stream.synchronize()
            # Another thread may allocate meanwhile, which would end a capture in global mode.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                first, second = work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        results = _borrowed(first), _borrowed(second)

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return results

        return replay

    def held_bytes(self) -> int:
        """As the driver says: code and graphs are no tensors."""
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


class _Memory:
    """Memory on the device, in the form that torch makes tensors of without a copy."""

    def __init__(self, tensor: Tensor) -> None:
        kinds = {torch.float32: "<f4", torch.int64: "<i8"}
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.itemsize for stride in tensor.stride()),
            "typestr": kinds[tensor.dtype],
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


def _borrowed(tensor: Tensor) -> Tensor:
    """The same tensor without owning its memory, which the pool of graphs keeps: what owns it
    keeps other graphs from using it, and logits are the largest thing there."""
    return torch.as_tensor(_Memory(tensor), device=tensor.device)


def select_recorder(device: torch.device) -> Recorder:
    """The recorder of a device."""
    assert device.type == "cuda", device
    return CudaRecorder(device)
