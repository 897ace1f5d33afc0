"""Runs as a process (`python -P nursery.py FD`): forks workers, each in milliseconds.

The first is forked at once, before the libraries of algebra are imported: whoever grades one answer needs no more, and has it
in a fraction of a second. From the second on they are forks of a process that has imported and warmed everything.

On the control socket: `fork` with the descriptor of a socket is answered by the child's process id, `kill PID` by nothing.
A worker reads one question a line and answers one line. What cannot be ended from inside (a pattern that backtracks, a number
with a billion digits) is ended from outside: the pool asks for `kill`; if the pool itself is gone, an alarm ends the worker.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys

ALARM_GRACE_SECONDS = 2
MOST_BYTES = 4 << 30
"""Of address space for a worker: an answer whose digits would fill the machine is a MemoryError of that one grading."""


def main(control: socket.socket) -> None:
    # Ctrl-C goes to the whole terminal; the pool decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        from slime.rollout.grading.registry import verdict, warm_up
    except Exception as error:
        control.sendall(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    control.sendall(json.dumps({"ready": os.getpid()}).encode())
    children: set[int] = set()
    first = True
    try:
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
            if not message:
                return  # the pool is gone
            _reap(children)
            if message == b"fork":
                if not first:
                    warm_up()
                first = False
                pid = os.fork()
                if pid == 0:
                    control.close()
                    _work(socket.socket(fileno=descriptors[0]), verdict)
                    os._exit(0)
                children.add(pid)
                os.close(descriptors[0])
                control.sendall(str(pid).encode())
            elif (pid := int(message.removeprefix(b"kill "))) in children:
                os.kill(pid, signal.SIGKILL)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def _reap(children: set[int]) -> None:
    """Forget children that ended. Until then their numbers stay theirs, so a kill cannot meet a stranger."""
    for pid in list(children):
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            children.remove(pid)


def _work(questions: socket.socket, verdict) -> None:
    from slime.rollout.grading.question import Question

    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    with questions, questions.makefile("rwb") as stream:
        for line in stream:
            asked = json.loads(line)
            seconds = asked.pop("seconds")
            signal.alarm(int(seconds) + ALARM_GRACE_SECONDS)
            try:
                answer = {"verdict": verdict(Question(**asked))}
            except (ValueError, RecursionError, MemoryError) as error:
                answer = {"error": str(error) or type(error).__name__, "kind": type(error).__name__}
            except Exception as error:  # a mistake of ours or of a library: told apart from a question that cannot be graded
                answer = {"error": _told(error), "kind": type(error).__name__}
            signal.alarm(0)
            stream.write(json.dumps(answer).encode() + b"\n")
            stream.flush()


def _told(error: Exception) -> str:
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error} ({last.filename}:{last.lineno} in {last.name})"


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
