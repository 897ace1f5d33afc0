"""A process that may read, and write nothing but one folder, run nothing but named programs, signal and call nobody.

Landlock, which Linux has since 5.13 and which needs no rights (https://docs.kernel.org/userspace-api/landlock.html). What a
newer kernel can forbid too is forbidden there: TCP since 6.7, signals to other processes since 6.12.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on x86-64 and arm64
_VERSION, _BENEATH = 1, 1
_NO_NEW_PRIVILEGES = 38

_RUN, _WRITE, _READ, _LIST = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_FIRST = (1 << 13) - 1
"""Every right that the first version knows: those above, removing, and making each kind of file."""
_LATER = {2: 1 << 13, 3: 1 << 14}
"""Version -> what it adds: moving files to another folder, truncating."""
_TCP, _OTHERS = 0b11, 0b11
"""Binding and connecting; sockets and signals of processes outside."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def version() -> int:
    """Of this kernel's Landlock; 0 where it has none."""
    return max(0, _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION)))


def confine(*, writable: Path, programs: Iterable[Path]) -> None:
    """From here on, for this process and its children. Raises OSError where the kernel refuses."""
    known = version()
    if not known:
        raise OSError("this kernel has no Landlock")
    rights = _FIRST | sum(more for since, more in _LATER.items() if known >= since)
    asked = _Ruleset(rights, _TCP if known >= 4 else 0, _OTHERS if known >= 6 else 0)
    size = 24 if known >= 6 else 16 if known >= 4 else 8
    ruleset = _checked(_libc.syscall(_CREATE_RULESET, ctypes.byref(asked), ctypes.c_size_t(size), ctypes.c_uint32(0)))
    _allow(ruleset, Path("/"), _READ | _LIST)
    _allow(ruleset, writable, rights & ~_RUN)
    _allow(ruleset, Path("/dev/null"), _WRITE | _READ)
    for program in {one.resolve() for one in programs} | _loaders():
        _allow(ruleset, program, _RUN | _READ)
    _checked(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _checked(_libc.syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)))
    os.close(ruleset)


def _loaders() -> set[Path]:
    """What the kernel runs to load a program's libraries."""
    places = (Path("/lib"), Path("/lib64"))
    return {file.resolve() for place in places for name in ("ld-linux*", "ld-musl*") for file in place.glob(name)}


def _allow(ruleset: int, place: Path, rights: int) -> None:
    held = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = _Beneath(rights, held)
        _checked(
            _libc.syscall(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0))
        )
    finally:
        os.close(held)


def _checked(answer: int) -> int:
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return answer
