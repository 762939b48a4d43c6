"""What this machine offers, without importing torch (which takes seconds). Starts no process."""

import ast
import ctypes
import importlib.util
import os
import resource
from pathlib import Path

from core.devices.native_dtypes import native_dtypes
from core.errors import ResourceError
from core.interfaces.launcher import Machine


def find_machine(device: str) -> Machine:
    """This machine, with `engine.device` resolved: auto is "cuda" where torch could use it.

    Raises ResourceError for "cuda" where that is impossible, with the reason.
    """
    cpus, dtypes = usable_cpus(), native_dtypes()
    if device == "cpu":
        return Machine(device="cpu", num_devices=0, cpus=cpus, dtypes=dtypes)
    devices, reason = _cuda_devices()
    if devices:
        return Machine(
            device="cuda",
            num_devices=len(devices),
            device_bytes=min(devices),
            cpus=cpus,
            dtypes=dtypes,
        )
    if device == "cuda":
        raise ResourceError(f"engine.device=cuda: {reason}; set engine.device=cpu or auto")
    return Machine(device="cpu", num_devices=0, cpus=cpus, dtypes=dtypes)


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, ...]:
    """The logical CPUs this process may use: its affinity, cut to the container's quota."""
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(os.cpu_count() or 1))
    cpus = sorted(os.sched_getaffinity(0))
    quota = _cgroup_quota(cgroup)
    if quota is not None:
        cpus = cpus[: max(1, round(quota))]
    return tuple(cpus)


def raise_descriptor_limit() -> int:
    """Set this process's limit on open files to the hard limit; returns what holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # a kernel that allows less than it says
            return soft
    return hard if hard != resource.RLIM_INFINITY else 2**31 - 1


def _cgroup_quota(cgroup: Path) -> float | None:
    """CPUs' worth of time the control group of this container may use; None: no limit.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files
    """
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):  # no control groups, or those of version 1
        return None


def _cuda_devices() -> tuple[list[int], str]:
    """The memory of each CUDA device that torch could use (CUDA_VISIBLE_DEVICES obeyed), in bytes;
    or why there is none."""
    if not _torch_has_cuda():
        return [], "the installed torch is built without CUDA"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return [], "no NVIDIA driver is installed (libcuda.so.1)"
    status = driver.cuInit(0)
    if status != 0:
        return [], f"the NVIDIA driver found no usable device (cuInit returned {status})"
    count = ctypes.c_int(0)
    status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0 or count.value == 0:
        return [], "no CUDA device is visible (see CUDA_VISIBLE_DEVICES)"
    return [_device_bytes(driver, ordinal) for ordinal in range(count.value)], ""


def _device_bytes(driver: ctypes.CDLL, ordinal: int) -> int:
    """Memory of a device by the driver's API; 0 where it doesn't tell."""
    device, total = ctypes.c_int(0), ctypes.c_size_t(0)
    if driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(ordinal)) != 0:
        return 0
    if driver.cuDeviceTotalMem_v2(ctypes.byref(total), device) != 0:
        return 0
    return total.value


def _torch_has_cuda() -> bool:
    """Whether torch's version file names a CUDA version; the file is read, not run."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    tree = ast.parse((Path(spec.origin).parent / "version.py").read_text())
    for node in tree.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id="cuda"), value=ast.Constant(value=value)):
                return value is not None
            case ast.Assign(targets=[ast.Name(id="cuda")], value=ast.Constant(value=value)):
                return value is not None
            case _:
                continue
    return False
