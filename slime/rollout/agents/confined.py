"""Runs as a process (`python -I -S confined.py SETTINGS < CODE`): Python code of a stranger, with limits.

Where the kernel lets an ordinary user have namespaces, the code sees no network, no process but its own, and of the file
system the interpreter, read-only, beside an empty folder in memory; it ends with everything it started when this process ends.
Elsewhere the limits of CPU time, memory, open files and file sizes hold alone. SETTINGS is JSON, see Limits in sandbox.py.

Must never know: this project. It is read by an interpreter without site-packages.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NETWORK = 0x20000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES = 1, 38
_NOBODY = 65534
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    settings = json.loads(sys.argv[1])
    _die_with_the_parent()
    code = sys.stdin.buffer.read()
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        _die_with_the_parent()
        os._exit(_inside(settings, code, ready[1], go[0]))
    os.close(ready[1])
    if os.read(ready[0], 1):  # it is in its namespaces, and who it is there is for us to say
        try:
            _map_users(child)
            os.write(go[1], b"y")
        except OSError as error:
            os.write(go[1], b"n")
            print(f"its users cannot be mapped: {error}", file=sys.stderr)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _die_with_the_parent() -> None:
    _libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _map_users(child: int) -> None:
    """Nobody, in the namespaces, is this user. Root is also itself, to prepare them, and steps down to the real nobody."""
    user, group = os.geteuid(), os.getegid()
    users = groups = f"0 0 1\n{_NOBODY} {_NOBODY} 1"
    if user != 0:
        users, groups = f"{_NOBODY} {user} 1", f"{_NOBODY} {group} 1"
        _write(f"/proc/{child}/setgroups", "deny")
    _write(f"/proc/{child}/uid_map", users)
    _write(f"/proc/{child}/gid_map", groups)


def _write(path: str, text: str) -> None:
    with open(path, "w") as out:
        out.write(text)


def _inside(settings: dict, code: bytes, ready: int, go: int) -> int:
    confined = True
    try:
        _checked(_libc.unshare(_NEW_USER | _NEW_PIDS | _NEW_NETWORK | _NEW_IPC | _NEW_MOUNTS), "unshare")
        os.write(ready, b"y")
        if os.read(go, 1) != b"y":
            return 1
        _own_root(settings)
    except OSError as error:
        if settings["required"]:
            print(f"namespaces are refused here: {error}", file=sys.stderr)
            return 1
        confined = False
    os.close(ready)
    init = os.fork()
    if init == 0:
        # Process 1 of its namespace: signals that end others do not end it, so the code is a child of it.
        _die_with_the_parent()
        os._exit(_run(settings, code, confined))
    return os.waitstatus_to_exitcode(os.waitpid(init, 0)[1])


def _own_root(settings: dict) -> None:
    """What is visible, at its own places below an empty root. Raises OSError where the kernel refuses."""
    root = settings["folder"]
    _mount(None, "/", None, _PRIVATE | _RECURSIVE)
    _mount("tmpfs", root, "tmpfs", _NO_SUID | _NO_DEVICES, f"size={settings['file_bytes']},mode=755")
    for path in settings["visible"]:
        inside = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.symlink(os.readlink(path), inside)
        elif os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
            _mount(path, inside, None, _BIND | _RECURSIVE)
            _mount(None, inside, None, _BIND | _REMOUNT | _READ_ONLY | _NO_SUID | _NO_DEVICES)
    os.makedirs(f"{root}/dev")
    for device in ("/dev/null", "/dev/urandom"):
        open(root + device, "w").close()
        _mount(device, root + device, None, _BIND)
    os.makedirs(f"{root}/tmp", exist_ok=True)
    os.chmod(f"{root}/tmp", 0o1777)
    os.chroot(root)
    os.chdir("/tmp")


def _run(settings: dict, code: bytes, confined: bool) -> int:
    """The code's exit status; 128 and the signal where one ended it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(reading, 0)
        os.close(writing)
        if confined and os.geteuid() == 0:
            _step_down()
        _limit(settings, confined)
        os.execve(
            settings["python"],
            [settings["python"], "-I", "-u", "-"],
            {"HOME": "/tmp", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        )
    os.close(reading)
    try:
        with os.fdopen(writing, "wb") as stream:
            stream.write(code)
    except BrokenPipeError:
        pass
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 128 - status if status < 0 else status


def _step_down() -> None:
    """Root's processes are not counted, and its files are its own."""
    os.setgroups([])
    os.setgid(_NOBODY)
    os.setuid(_NOBODY)


def _limit(settings: dict, confined: bool) -> None:
    _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    limits = {
        resource.RLIMIT_CPU: settings["cpu_seconds"],
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_FSIZE: settings["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if confined:  # counted in the namespace; outside it would count all that the user runs
        limits[resource.RLIMIT_NPROC] = settings["processes"]
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    _checked(_libc.mount(*words, flags, None if data is None else data.encode()), f"mount {target}")


def _checked(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(main())
