"""Compiles the Triton kernels of steps in parallel, before the steps run, and keeps them on disk.

A rehearsed step calls every layer as always, but its Triton launches only hand their kernels to
compiling threads: compiling one after the other, as launches meet them, takes several times as
long. Knows nothing of models or of which kernels there are.
"""

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.jit import JITFunction

from core.errors import ResourceError

CACHE_VARIABLE = "TRITON_CACHE_DIR"
# Half of a compilation holds the interpreter's lock, the rest is LLVM and an assembler process.
MAX_THREADS = 16


OnCompiled = Callable[[int, int], None]  # kernels compiled, kernels known so far


@contextmanager
def rehearsal(
    device: torch.device, on_compiled: OnCompiled, num_threads: int | None = None
) -> Iterator[None]:
    """Within, Triton kernels are compiled instead of run; all are compiled at its end.

    Whatever a kernel would have written is what `torch.empty` left there: zeros (in tensors made
    within), so that sizes and indices that follow from it are valid. Other operations run. For one
    thread of one process, on a device that nothing else uses meanwhile. `on_compiled` is called on
    that thread, at the end with equal numbers. Raises what a compilation raised.
    """
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    threads = num_threads or min(MAX_THREADS, os.cpu_count() or 1)
    with _Compilers(threads, device) as pool:
        mode = _RememberingMode(pool)
        with mode:
            JITFunction.run = compile_only
            try:
                with _zeros_for_empty():
                    yield
            finally:
                JITFunction.run = run
            futures = list(mode.raw_futures)
            for done, _ in enumerate(as_completed(futures)):
                on_compiled(done, len(futures))
        mode.put_in_place()
        on_compiled(len(futures), len(futures))


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels and, on a GPU, load them there: building the code that launches
    one takes a C compiler a tenth of a second."""

    def __init__(self, num_threads: int, device: torch.device) -> None:
        self._loads = device.type == "cuda"
        use_device = partial(torch.cuda.set_device, device) if self._loads else None
        super().__init__(num_threads, "compile-kernels", initializer=use_device)

    def submit(self, compile_kernel: Any, /, *args: Any, **kwargs: Any) -> Any:
        def work() -> Any:
            kernel = compile_kernel(*args, **kwargs)
            if self._loads:
                assert kernel.run is not None  # loads it
            return kernel

        return super().submit(work)


class _RememberingMode(AsyncCompileMode):  # type: ignore[misc]  # triton has no types
    """Lets every further launch find a kernel that is being compiled: working out anew that it is
    takes Triton a millisecond."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        super().__init__(pool)
        self._places: list[tuple[Callable[[Any], None], Any]] = []

    def submit(self, key: Any, compile_fn: Any, finalize_fn: Any, *rest: Any) -> Any:
        kernel = super().submit(key, compile_fn, finalize_fn, *rest)
        finalize_fn(kernel)
        self._places.append((finalize_fn, kernel))
        return kernel

    def put_in_place(self) -> None:
        """What is compiled takes the place of what was promised."""
        for finalize, kernel in self._places:
            finalize(kernel.result())


@contextmanager
def _zeros_for_empty() -> Iterator[None]:
    """New tensors hold zeros where torch would leave whatever was there. Not a dispatch mode, for
    which torch imports its compiler: several seconds on a slow disk."""
    owners: list[tuple[Any, str]] = [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]
    made = [getattr(owner, name) for owner, name in owners]
    for (owner, name), make in zip(owners, made, strict=True):
        setattr(owner, name, _zeroed(make))
    try:
        yield
    finally:
        for (owner, name), make in zip(owners, made, strict=True):
            setattr(owner, name, make)


def _zeroed(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def zeros(*args: Any, **kwargs: Any) -> Tensor:
        return make(*args, **kwargs).zero_()

    return zeros


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """A list that grows by the name of every kernel that is compiled within (none of those that
    were found on disk)."""
    names: list[str] = []
    before = triton.knobs.compilation.listener

    def listen(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            names.append(src.name)
        if before is not None:
            before(src=src, cache_hit=cache_hit, **rest)

    triton.knobs.compilation.listener = listen
    try:
        yield names
    finally:
        triton.knobs.compilation.listener = before


def keep_kernels_in(folder: Path) -> None:
    """Have compiled kernels stored in `folder`, which is made where it is missing, and found there
    by later starts. Raises ResourceError where others may write to it: what is in it is run.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise ResourceError(
            f"can't make the folder {folder} for compiled kernels ({error.strerror}); set "
            "engine.kernel_cache_dir to a folder that can be written"
        ) from error
    if status.st_mode & stat.S_IWOTH or status.st_uid != os.getuid():
        raise ResourceError(
            f"engine.kernel_cache_dir={folder} is another user's or may be written by everyone, "
            "and what is in it is run; choose a folder of your own"
        )
    os.environ[CACHE_VARIABLE] = str(folder)
