"""A process for each rank of a benchmark over several GPUs of one host."""

import subprocess
import sys
import tempfile
import time

_LOOK_S = 0.05
_ENDS_WITHIN_S = 20.0


def run(module: str, num_ranks: int) -> int:
    """Run `python -m MODULE` with this program's arguments and `--folder`, where ranks meet, and
    `--rank` for each of them. Returns the exit status, once the first rank has ended or any other
    has failed: the others wait for those, and are ended."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", module, *sys.argv[1:], "--folder", folder, "--rank"]
        ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(num_ranks)]
        try:
            return _first_status(ranks)
        finally:
            _end(ranks)


def _first_status(ranks: list[subprocess.Popen[bytes]]) -> int:
    while True:
        for rank, process in enumerate(ranks):
            status = process.poll()
            if status is not None and (rank == 0 or status != 0):
                return status
        time.sleep(_LOOK_S)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        process.terminate()
    for process in ranks:
        try:
            process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
