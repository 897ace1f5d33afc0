"""How a process ended, for those who are not its parent: Ray's raylet is, and keeps the exit status to itself.

    python -I -S keeper.py PID FILE        started by `keep` as a child of the process that it watches

It waits until the process has ended and writes "STATUS" (as wait(2) gives it) to FILE. The status is read from /proc while the
raylet has not asked for it, and from the process's pidfd afterwards, which Linux offers since 6.15.
"""

import fcntl
import os
import select
import struct
import sys
import time

_PIDFD_GET_INFO = 0xC040FF0B  # _IOWR(0xFF, 11, struct pidfd_info of 64 bytes), linux/pidfd.h
_PIDFD_INFO_EXIT = 1 << 3
_EXIT_CODE_AT = 60


def keep(pid: int, file: str) -> None:
    """Start a keeper of this process, in a session of its own, so that it outlives what ends this one's group."""
    import subprocess

    command = [sys.executable, "-I", "-S", __file__, str(pid), file]
    nothing = subprocess.DEVNULL
    keeper = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
    keeper.returncode = 0  # it outlives us, so nobody waits for it, and what deletes the object has nothing to look after


def wait(pid: int) -> int | None:
    """The exit status of a process that need not be our child; None where nobody knows any more."""
    watched = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    poll.poll()
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return _reaped(watched)
        if fields[0] in "ZX":
            return int(fields[49])
        time.sleep(0.001)
    return None


def _reaped(pidfd: int) -> int | None:
    info = bytearray(struct.pack("<Q", _PIDFD_INFO_EXIT) + bytes(56))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    given = struct.unpack_from("<Q", info)[0] & _PIDFD_INFO_EXIT
    return struct.unpack_from("<i", info, _EXIT_CODE_AT)[0] if given else None


def main() -> None:
    pid, file = int(sys.argv[1]), sys.argv[2]
    status = wait(pid)
    if status is not None:
        with open(f"{file}.part", "w") as note:
            note.write(str(status))
        os.replace(f"{file}.part", file)


if __name__ == "__main__":
    main()
