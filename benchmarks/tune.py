"""Tunes this machine's GPUs: sweeps launches of every shape and writes core/gpu_tools/tuned.

    python -m benchmarks.tune                               # everything: hours of one GPU
    python -m benchmarks.tune --only linear:8b moe:qwen3    # program, and how a shape's name begins
    python -m benchmarks.tune --tables DIR                  # takes in what a run wrote to DIR

One sweep a GPU runs at a time, on all GPUs there are. A device has to be in
core/gpu_tools/tuned/devices.json. What a sweep measures is said by its program: gpu_linear,
gpu_fp8_linear, gpu_moe, gpu_attention.
"""

import argparse
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Sweep:
    """One shape of one program."""

    program: str  # "linear" of benchmarks.gpu_linear
    shape: str
    rows: tuple[int, ...] = ()  # of the program's own choice where empty

    @property
    def name(self) -> str:
        return f"{self.program}-{self.shape}"

    def command(self, folder: Path) -> list[str]:
        words = [sys.executable, "-m", f"benchmarks.gpu_{self.program}", "--sweep"]
        words += ["--shape" if self.program == "moe" else "--shapes", self.shape]
        if self.rows:
            option = "--sequences" if self.program == "attention" else "--rows"
            words += [option, *map(str, self.rows)]
        return [*words, "--write", str(folder / self.name)]


def all_sweeps() -> list[Sweep]:
    """Of every shape that the programs know."""
    from benchmarks import gpu_attention, gpu_fp8_linear, gpu_linear_tiles, gpu_moe_tiles

    shapes: dict[str, Sequence[str]] = {
        "attention": list(gpu_attention.SHAPES),
        "moe": list(gpu_moe_tiles.SHAPES),
        "linear": list(gpu_linear_tiles.SHAPES),
        "fp8_linear": list(gpu_fp8_linear.SHAPES),
    }
    return [Sweep(program, shape) for program, names in shapes.items() for shape in names]


def chosen(only: Sequence[str], rows: Sequence[int]) -> list[Sweep]:
    """Those that a word "program:beginning" speaks of; all without words."""
    found = []
    for sweep in all_sweeps():
        words = [word.partition(":") for word in only]
        if not only or any(
            sweep.program == program and sweep.shape.startswith(beginning)
            for program, _, beginning in words
        ):
            found.append(Sweep(sweep.program, sweep.shape, tuple(rows)))
    if not found:
        known = ", ".join(f"{sweep.program}:{sweep.shape}" for sweep in all_sweeps())
        raise SystemExit(f"no shape is meant by {' '.join(only)}; there are {known}")
    return found


def run_all(sweeps: list[Sweep], folder: Path, num_gpus: int, until_s: float) -> None:
    """A thread a GPU; sweeps that would begin later than `until_s` are left out and named."""
    waiting: queue.SimpleQueue[Sweep] = queue.SimpleQueue()
    for sweep in sweeps:
        waiting.put(sweep)
    begin = time.monotonic()

    def work(gpu: int) -> None:
        while True:
            try:
                sweep = waiting.get_nowait()
            except queue.Empty:
                return
            if time.monotonic() - begin > until_s:
                print(f"left out: {sweep.name}", flush=True)
                continue
            (folder / sweep.name).mkdir(parents=True, exist_ok=True)
            with (folder / sweep.name / "log").open("w") as log:
                started = time.monotonic()
                environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
                status = subprocess.run(
                    sweep.command(folder), stdout=log, stderr=log, env=environment, check=False
                ).returncode
            seconds = time.monotonic() - started
            print(f"{sweep.name} on GPU {gpu}: status {status}, {seconds:.0f} s", flush=True)

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in range(num_gpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def write_tables(folder: Path) -> None:
    """By the programs themselves."""
    for program, option in (
        ("attention", "--tables"),
        ("moe", "--tables"),
        ("linear", "--tables"),
        ("fp8_linear", "--table"),
    ):
        files = sorted(map(str, folder.glob(f"{program}-*/sweep.json")))
        if files:
            command = [sys.executable, "-m", f"benchmarks.gpu_{program}", option, *files]
            subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="PROGRAM:SHAPE")
    parser.add_argument("--rows", nargs="+", type=int, default=[], help="instead of all")
    parser.add_argument("--write", type=Path, default=Path("tuning"), help="folder for sweeps")
    parser.add_argument("--tables", type=Path, help="only take in what is in this folder")
    parser.add_argument("--until", type=float, default=1e9, help="seconds to begin sweeps in")
    arguments = parser.parse_args()
    if arguments.tables is None:
        import torch

        num_gpus = torch.cuda.device_count()
        if num_gpus == 0:
            raise SystemExit("no GPU was found")
        sweeps = chosen(arguments.only, arguments.rows)
        run_all(sweeps, arguments.write, num_gpus, arguments.until)
    write_tables(arguments.tables or arguments.write)


if __name__ == "__main__":
    main()
