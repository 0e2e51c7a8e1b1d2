"""kernel.cpp as a library: built at first use by the C++ compiler of this machine, kept in the user's cache, and loaded.

It computes on the threads of the OpenMP runtime that PyTorch has loaded: a second one would compete with it for the cores.
Where that is not found in PyTorch's folder, or is of another kind (macOS), it computes on one thread.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniprune.errors import InputError, first_line

SOURCE = Path(__file__).with_name("kernel.cpp")
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-w")
PATHS = ("plain", "avx2", "avx512", "avx512_bf16", "neon")  # of instructions, from slow to fast, as kernel.cpp numbers them
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WORD = 64  # weights whose bits are read together
PADDING = WORD  # values that may be read past the last
LARGEST_BATCH = 8
OPENMP = ("libgomp*", "libomp*", "libiomp5*")
BUILDING = threading.Lock()

POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
SIGNATURES: dict[str, tuple[Any, ...]] = {  # name: result, arguments
    "bitmask_start": (INT, POINTER, POINTER, POINTER),
    "bitmask_offsets": (SIZE, POINTER, SIZE, SIZE, POINTER),
    "bitmask_count": (SIZE, POINTER, SIZE, INT, INT),
    "bitmask_pack": (SIZE, POINTER, SIZE, SIZE, INT, INT, POINTER, POINTER, SIZE),
    "bitmask_unpack": (None, POINTER, SIZE, SIZE, POINTER, INT),
    "bitmask_multiply": (None, POINTER, POINTER, POINTER, INT, INT),
}


class Handle(ctypes.Structure):
    """``struct Matrix`` of kernel.cpp."""

    _fields_ = (
        ("values", POINTER),
        ("bits", POINTER),
        ("offsets", POINTER),
        ("bias", POINTER),
        ("rows", SIZE),
        ("columns", SIZE),
        ("type", ctypes.c_int32),
        ("path", ctypes.c_int32),
    )

    def __init__(self, tensors: Sequence[Tensor | None], shape: tuple[int, int], dtype: torch.dtype, path: str | None = None):
        """tensors: values, bits, offsets and bias; they live as long as this does. path: by default the fastest here."""
        addresses = (None if one is None else one.data_ptr() for one in tensors)
        super().__init__(*addresses, *shape, TYPES[dtype], library().path(path))
        self.tensors = tensors
        self.address = ctypes.addressof(self)

    def multiply(self, tokens: Tensor) -> Tensor:
        """``tokens @ weight.T + bias``: ``[..., columns]`` -> ``[..., rows]``, 1 to LARGEST_BATCH tokens, summed in float32."""
        tokens = tokens.contiguous()
        output = tokens.new_empty((*tokens.shape[:-1], self.rows))
        batch = tokens.numel() // tokens.shape[-1]
        library().multiply(self.address, tokens.data_ptr(), output.data_ptr(), batch, torch.get_num_threads())
        return output


class Library:
    """The kernel's functions. paths: of instructions that this machine has, from slow to fast."""

    def __init__(self, file: Path) -> None:
        library = ctypes.CDLL(str(file))
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        found = library.bitmask_start(*_openmp())
        self.paths = [path for number, path in enumerate(PATHS) if found >> number & 1]
        self.fastest = PATHS.index(self.paths[-1])
        self.offsets, self.count, self.pack = library.bitmask_offsets, library.bitmask_count, library.bitmask_pack
        self.unpack, self.multiply = library.bitmask_unpack, library.bitmask_multiply

    def path(self, name: str | None = None) -> int:
        """The number of a path that this machine has, by default of the fastest."""
        assert name is None or name in self.paths
        return self.fastest if name is None else PATHS.index(name)


@cache
def library() -> Library:
    """The kernel, built if it is not there yet: a library for each source, compiler and set of flags.

    Raises InputError that says what is missing.
    """
    compiler = _compiler()
    built_by = [_version(compiler), platform.machine(), *FLAGS, *compiler[1:]]
    key = hashlib.sha256("\0".join(built_by).encode() + SOURCE.read_bytes()).hexdigest()
    file = _folder() / f"bitmask-{key[:20]}{'.dylib' if sys.platform == 'darwin' else '.so'}"
    with BUILDING:
        if not file.is_file():
            _build(compiler, file)
    try:
        return Library(file)
    except OSError as error:
        raise InputError(f"the kernel for pruned models, {file}, does not load ({first_line(error)}); remove it") from error


def dense_handle(weight: Tensor) -> Handle:
    """Of a dense matrix on the CPU, in whole words."""
    rows, columns = weight.shape
    assert columns % WORD == 0
    assert weight.is_contiguous()
    assert weight.is_cpu
    return Handle((weight, None, None, None), (rows, columns), weight.dtype)


def _compiler() -> list[str]:
    """The compiler that CXX names, with its arguments if there are any (``ccache g++``), or the first that is found."""
    named = os.environ.get("CXX", "").strip()
    for program, *arguments in ([named], named.split()) if named else ([name] for name in COMPILERS):
        if found := shutil.which(program):
            return [found, *arguments]
    what = f"CXX names {named!r}, which is not there" if named else f"none of {', '.join(COMPILERS)} is there"
    raise InputError(f"the kernel for pruned models needs a C++ compiler once, and {what}; install one, e.g. g++")


def _version(compiler: Sequence[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(
            f"the C++ compiler {' '.join(compiler)} does not run: {first_line(error)}; set CXX to another"
        ) from error


def _folder() -> Path:
    """The user's cache; a folder of this process where that cannot be written, or where others could put a library."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uniprune"
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = home.stat()
        if os.access(home, os.W_OK) and status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return home
    except (OSError, RuntimeError):  # no home
        pass
    return Path(_own_folder().name)


@cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="uniprune-")


def _build(compiler: Sequence[str], file: Path) -> None:
    """Compiles into a file of its own first: another process may build the same one."""
    handle, name = tempfile.mkstemp(suffix=file.suffix, dir=file.parent)
    os.close(handle)
    try:
        command = [*compiler, *FLAGS, str(SOURCE), "-o", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
            raise InputError(
                f"the kernel for pruned models does not compile with {' '.join(compiler)}: {reason[:300]}; set CXX to another"
            )
        os.replace(name, file)
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(
            f"the C++ compiler {' '.join(compiler)} does not run: {first_line(error)}; set CXX to another"
        ) from error
    finally:
        Path(name).unlink(missing_ok=True)


def _openmp() -> list[int | None]:
    """Where three functions of PyTorch's OpenMP runtime lie; none, and so one thread, if it has another kind."""
    folder = Path(torch.__file__).parent
    for place in (folder / "lib", folder / ".dylibs", folder.parent / "torch.libs"):
        for file in sorted(one for pattern in OPENMP for one in place.glob(pattern)):
            try:
                runtime = ctypes.CDLL(str(file))  # loaded already: the same one
                names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
                return [ctypes.cast(getattr(runtime, name), POINTER).value for name in names]
            except (OSError, AttributeError):
                continue
    return [None, None, None]
