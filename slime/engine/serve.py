"""The program of an engine process: SGLang's own server, with the run's token and a life bound to its parent's.

    python -m slime.engine.serve <sglang options>        (started by slime.engine.process, not by hand)

The token is the first line of stdin, so that it is in no argument list and no environment. The pipe stays open for as
long as the parent lives; when it closes, the whole process group is killed, so a killed actor leaves no server behind.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from slime.compat.sglang import answers, keep_token
from slime.compat.sglang.tools import give_tools_their_field
from slime.engine import kernels

if __name__ in ("__main__", "__mp_main__"):
    # SGLang's debug dumper imports megatron-core in every scheduler where it is installed, and megatron-core then switches
    # torch_memory_saver to a mode in which CUDA graphs cannot be paused. Here and not in main(), because a spawned child runs
    # this module again under the second name before it does anything else; a forked one inherits it.
    sys.modules["megatron"] = None  # type: ignore[assignment]

if __name__ == "__mp_main__" and (recorded := os.environ.get(kernels.LISTS_VARIABLE, "").partition(os.pathsep)[0]):
    kernels.record(Path(recorded))

if __name__ == "__mp_main__" and answers.wanted(sys.argv):
    answers.install_in_ranks()


def read_token() -> str:
    """The first line of file descriptor 0, byte by byte: a buffered reader would hold a lock at exit."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode()


def stop_with_parent() -> None:
    """Returns at once; a small process of the same group waits for the parent's end of stdin to close, then kills the group.

    A process and not a thread, because the router runs in native code that never lets another Python thread in. Without a grace
    period, because a child that outlives the group's leader in its own start-up would be nobody's to stop.
    """
    if os.fork() == 0:
        while os.read(0, 4096):
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)


def compile_ahead() -> None:
    """Returns at once; kernels that are known to come and were never compiled here are compiled by a process of this group."""
    lists = os.environ.get(kernels.LISTS_VARIABLE, "").split(os.pathsep)
    if kernels.missing(kernels.read_lists(lists), os.environ):
        subprocess.Popen([sys.executable, "-m", "slime.engine.kernels", *filter(None, lists)], stdin=subprocess.DEVNULL)


def hide_in_logs(secret: str) -> None:
    """Every record of this process, and of those that it forks, shows *** in the secret's place: SGLang logs its options."""
    make = logging.getLogRecordFactory()

    def masked(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if secret in f"{record.msg} {record.args}":
            record.msg, record.args = record.getMessage().replace(secret, "***"), None
        return record

    logging.setLogRecordFactory(masked)


def main() -> None:
    token = read_token()
    stop_with_parent()
    if token:
        hide_in_logs(token)
    keep_token(token)
    compile_ahead()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    give_tools_their_field()
    keys = [f"--api-key={token}", f"--admin-api-key={token}"] if token else []
    arguments = prepare_server_args([*sys.argv[1:], *keys])
    if answers.wanted(sys.argv):
        answers.install_in_server()
        answers.install_in_ranks()
    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
