"""One tensor's part from a checkpoint to where it stays: read, dequantised, cast and copied.

Some rows at a time through a small buffer, so that nothing but the result needs memory of its
size. Knows nothing of models. Shape legend: R rows and C columns of the part, seen as a matrix.
"""

import math
import threading

import torch
from torch import Tensor

from core.interfaces.model import BlockQuantization
from core.interfaces.weights import BlockFp8, GroupedInts, LinearWeight, WeightSource
from core.weights.manifest import FP8, TensorRequest, is_block_quantised, scales_name, scales_shape

# Bytes read before they are passed on: on a CPU they should still be in its cache then.
STAGING_BYTES = 1 << 22
# Values dequantised at once on a CPU: what torch does on the calling thread.
CHUNK_VALUES = 1 << 15


class TakeLoader:
    """Loads parts of one checkpoint onto one device. Any number of threads may call it."""

    def __init__(
        self, source: WeightSource, device: torch.device, block: BlockQuantization
    ) -> None:
        self._source, self._device, self._block = source, device, block
        self._tensors = source.tensors()
        self._thread = threading.local()

    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self, take: TensorRequest) -> LinearWeight:
        """The part, on the device; whole once this returns."""
        if take.group_bits:
            return self._groups(take)
        if take.as_blocks:
            return BlockFp8(self._plain(take, FP8), self._scales(take).to(self._device))
        if is_block_quantised(self._tensors[take.name]):
            return self._dequantised(take)
        return self._plain(take, take.dtype)

    def _groups(self, take: TensorRequest) -> GroupedInts:
        found = self._source.groups(take.name, take.dim, *take.bounds, self._staging())
        assert found.values_OI.shape == take.local_shape, (take, found.values_OI.shape)
        return GroupedInts(
            found.values_OI.to(self._device),
            found.scales_OG.to(self._device),
            found.minimums_OG.to(self._device),
            found.bits,
        )

    def _plain(self, take: TensorRequest, dtype: torch.dtype) -> Tensor:
        out, out_RC = self._empty(take, dtype)
        row = 0
        for rows in self._source.stream(take.name, take.dim, *take.bounds, self._staging()):
            out_RC[row : row + rows.shape[0]].copy_(rows)
            row += rows.shape[0]
        assert row == out_RC.shape[0] or out_RC.numel() == 0, (take, row)
        return out

    def _dequantised(self, take: TensorRequest) -> Tensor:
        """Every product of value and scale is exact in float32 but for its one rounding."""
        out, out_RC = self._empty(take, take.dtype)
        scales = self._scales(take).to(self._device)
        first_row, first_column = take.bounds[0] * (1 - take.dim), take.bounds[0] * take.dim
        num_columns = out_RC.shape[1]
        # Scale of each column, by row of blocks; the part may begin inside a block.
        skip = first_column % self._block.columns
        columns = torch.arange(skip, skip + num_columns, device=self._device)
        scales_bC = scales[:, columns // self._block.columns]
        first_block = first_row // self._block.rows
        chunk = max(1, CHUNK_VALUES // max(1, num_columns))
        row = 0
        for rows in self._source.stream(take.name, take.dim, *take.bounds, self._staging()):
            values_RC = rows.to(self._device)
            has_numbers = self._device.type == "cpu" and not _has_nan(values_RC)
            done = 0
            while done < rows.shape[0]:
                absolute = first_row + row
                block = absolute // self._block.rows
                count = min((block + 1) * self._block.rows - absolute, rows.shape[0] - done)
                if self._device.type == "cpu":
                    count = min(count, chunk)
                scale_C = scales_bC[block - first_block]
                part = values_RC[done : done + count]
                values = _as_float32(part) if has_numbers else part.float()
                out_RC[row : row + count].copy_(values.mul_(scale_C))
                done += count
                row += count
        assert row == out_RC.shape[0] or out_RC.numel() == 0, (take, row)
        return out

    def _scales(self, take: TensorRequest) -> Tensor:
        """The scales of all blocks that the part touches, on the CPU."""
        name = scales_name(take.name)
        edge = (self._block.rows, self._block.columns)[take.dim]
        start, stop = take.bounds
        first, last = start // edge, -(-stop // edge)
        shape = list(scales_shape(take.shape, self._block))
        shape[take.dim] = last - first
        scales = torch.empty(shape, dtype=torch.float32)
        row = 0
        for rows in self._source.stream(name, take.dim, first, last, self._staging()):
            scales[row : row + rows.shape[0]].copy_(rows)
            row += rows.shape[0]
        return scales

    def _empty(self, take: TensorRequest, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A new tensor for the part, and the matrix of what is read into it: what lies past the
        end of the stored tensor is zeros already."""
        shape, dim = take.local_shape, take.dim
        out = torch.empty(shape, dtype=dtype, device=self._device)
        if not shape:
            return out, out.view(1, 1)
        start, stop = take.bounds
        inner = math.prod(shape[dim + 1 :])
        if stop - start < shape[dim]:
            out.narrow(dim, stop - start, shape[dim] - (stop - start)).zero_()
        if dim == 0:
            return out, out.view(shape[0], inner)[: stop - start]
        matrix = out.view(math.prod(shape[:dim]), shape[dim] * inner)
        return out, matrix[:, : (stop - start) * inner]

    def _staging(self) -> Tensor:
        """This thread's buffer; pinned where a GPU copies out of it."""
        staging: Tensor | None = getattr(self._thread, "staging", None)
        if staging is None:
            pinned = self._device.type == "cuda"
            staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=pinned)
            self._thread.staging = staging
        return staging


def _as_float32(values: Tensor) -> Tensor:
    """float8_e4m3fn values, none of them NaN, in float32. Sign, exponent and mantissa are shifted
    to their places in float16, whose exponent has a bias that is larger by 8. Four times as fast on
    CPUs as torch's own conversion (2.13)."""
    bits = values.view(torch.int8).to(torch.int16)  # eight copies of the sign, then the value
    halves = bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)
    return halves.float().mul_(256.0)


def _has_nan(values: Tensor) -> bool:
    """Whether there is a NaN among float8_e4m3fn values: all bits set but for the sign."""
    if values.numel() == 0:
        return False
    return int(values.view(torch.int8).max()) == 127 or int(values.view(torch.uint8).max()) == 255
