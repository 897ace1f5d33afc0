"""CUDA C++ compiled at first use: one source file -> one shared library, kept in a cache folder, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import torch
from torch import Tensor

FLAGS = ("-O3", "-std=c++20", "-gencode=arch=compute_90a,code=sm_90a", "--shared", "-Xcompiler", "-fPIC")


def nvcc() -> str | None:
    """Path of the CUDA compiler, or None."""
    found = shutil.which("nvcc")
    usual = pathlib.Path("/usr/local/cuda/bin/nvcc")
    return found or (str(usual) if usual.exists() else None)


def why_not() -> str | None:
    """The reason why Hopper kernels cannot be built and run here, or None if they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"compute capability {capability[0]}.{capability[1]}, the kernels are for 9.0 (Hopper)"
    if nvcc() is None:
        return "nvcc is not installed"
    return None


@functools.cache
def load(source: pathlib.Path) -> ctypes.CDLL:
    """Compiles `source` for Hopper, or takes the library that an earlier process made of the same text with the same compiler.

    Several processes may do so at once: each writes its own file and renames it. RuntimeError carries the compiler's words.
    """
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError(f"cannot compile {source.name}: nvcc is neither on the PATH nor in /usr/local/cuda/bin")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    # The host's architecture too: machines of both kinds may share a home folder.
    texts = [
        version,
        platform.machine(),
        " ".join(FLAGS),
        *(path.read_text() for path in sorted([source, *source.parent.glob("*.cuh")])),
    ]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    folder = _cache() / "slime" / "ops"
    library = folder / f"{source.stem}-{digest}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = pathlib.Path(scratch) / library.name
            done = subprocess.run([compiler, *FLAGS, "-o", str(built), str(source)], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"nvcc could not compile {source}:\n{done.stderr}")
            built.rename(library)
    return ctypes.CDLL(str(library))


CACHE_VARIABLE = "SLIME_KERNEL_CACHE"


def _cache() -> pathlib.Path:
    named = os.environ.get(CACHE_VARIABLE) or os.environ.get("XDG_CACHE_HOME")
    return pathlib.Path(named) if named else pathlib.Path.home() / ".cache"


def cache_environment(folder: str | pathlib.Path) -> dict[str, str]:
    """Where a trainer's compilers keep what they made, named by versions: below one folder, which nodes may share."""
    base = pathlib.Path(folder).absolute() / "trainer"
    return {CACHE_VARIABLE: str(base), "TRITON_CACHE_DIR": str(base / "triton")}


def call(function: ctypes._CFuncPtr, *arguments: Tensor | int | float | None) -> None:
    """Launches on the current stream of the current device. Tensors go as pointers, int as int64, float as float; None as null.

    The C function takes the stream last and returns a cudaError_t; anything but 0 is raised. Integer parameters narrower than
    64 bits are fine on x86-64 and Arm: the callee reads the low half of the register or stack slot.
    """
    converted = [_converted(argument) for argument in arguments]
    error = function(*converted, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
    if error != 0:
        raise RuntimeError(f"{function.__name__}: CUDA error {error} at launch")


def _converted(argument: Tensor | int | float | None):
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_void_p(None) if argument is None else ctypes.c_int64(argument)
