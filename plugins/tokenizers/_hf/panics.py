"""What the tokenizers library raises, as errors of ours: plain Exceptions, and where its own code
panics over odd files or ids, something that is no Exception at all. Knows nothing of tokenizers.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from core.errors import ModelError, NodeweaveError

MAX_SHOWN = 300  # characters of the library's own words
_NOT_THE_LIBRARYS = (NodeweaveError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit)
_P = ParamSpec("_P")
_T = TypeVar("_T")


class LibraryError(Exception):
    """The library panicked."""


@contextmanager
def building(path: Path) -> Iterator[None]:
    """Raise ModelError that names the file for whatever goes wrong while a tokenizer is built."""
    try:
        yield
    except _NOT_THE_LIBRARYS:
        raise
    except BaseException as error:
        words = str(error)[:MAX_SHOWN] or type(error).__name__
        raise ModelError(
            f"{path} is not a tokenizer: {words}; repair it, or fetch it again"
        ) from error


def without_panics(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, with panics raised as LibraryError, which costs one request and no server."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except (Exception, *_NOT_THE_LIBRARYS):
            raise
        except BaseException as error:
            raise LibraryError(f"the tokenizer failed: {str(error)[:MAX_SHOWN]}") from error

    return run
