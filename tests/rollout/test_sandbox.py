"""Code of a policy: what it may use, what ends it, what it cannot see."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from slime.rollout.agents.sandbox import Limits, PythonSandbox

# A busy machine gives a second of CPU time late.
SMALL = Limits(cpu_seconds=1, wall_seconds=60, memory_bytes=256 << 20, file_bytes=1 << 20, processes=8, output_bytes=400)


def run(code: str, limits: Limits = SMALL, **options):
    return asyncio.run(PythonSandbox(limits, **options).run(code))


@pytest.fixture(scope="module")
def isolated():
    """Skips what only a kernel with namespaces for ordinary users can promise."""
    try:
        run("", isolation="required")
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print(6 * 7)", "42"),
        ("import numpy; print(numpy.arange(3).sum())", "3"),
        ("import sys; print('a'); print('b', file=sys.stderr)", "a\nb"),
        ("open('x', 'w').write('kept'); print(open('x').read())", "kept"),
        ("print(input())", "EOFError: EOF when reading a line"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("print('é🙂')", "é🙂"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("", ""),
    ],
)
def test_code_gives_its_output_and_its_error(code, output):
    found = run(code)
    assert found.output.rstrip("\n").endswith(output) and found.exceeded == ""
    assert found.status == (0 if "Error" not in output else 1)


@pytest.mark.parametrize(
    ("code", "exceeded", "told"),
    [
        ("while True: pass", "cpu", "[out of CPU time]"),
        ("print('so far', flush=True)\nimport time; time.sleep(60)", "wall", "so far\n[out of time]"),
        ("while True: print('a' * 100)", "output", "[too much output]"),
        ("b = bytearray(1 << 30)", "", "MemoryError"),
        ("open('x', 'w').write('a' * (4 << 20))", "", "OSError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "", "[ended by signal 11]"),
    ],
)
def test_limits_end_code_and_the_policy_is_told_which(code, exceeded, told):
    found = run(code, replace(SMALL, wall_seconds=2) if exceeded == "wall" else SMALL)
    assert found.exceeded == exceeded and told in found.for_the_policy()
    assert len(found.output) <= SMALL.output_bytes and found.status != 0


def test_output_that_nobody_read_in_time_does_not_keep_its_process(monkeypatch):
    """Its buffer was full, so asyncio had stopped to look at the pipe when the code was ended."""

    class Busy(PythonSandbox):
        async def _read(self, process, code):
            read = process.stdout.read

            async def late(count):
                await asyncio.sleep(1)
                return await read(count)

            monkeypatch.setattr(process.stdout, "read", late)
            return await super()._read(process, code)

    found = asyncio.run(asyncio.wait_for(Busy(SMALL).run("while True: print('a' * 100)"), 40))
    assert found.exceeded == "output" and found.status == 128 + 9


def test_code_sees_no_network(isolated):
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert "Connection refused" in run(connect).output or "unreachable" in run(connect).output


def test_code_sees_neither_files_nor_processes_nor_the_environment(isolated, tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "token")
    (tmp_path / "checkpoint").write_text("weights")
    look = f"""
import os
print(*map(os.path.exists, [{str(tmp_path)!r}, '/proc/1', '/etc/passwd', {os.getcwd()!r} + '/slime']))
print(dict(os.environ).get('A_SECRET'), os.getppid(), os.getuid())
try:
    open('/usr/planted', 'w')
except OSError as error:
    print(error.strerror)
"""
    assert run(look).output == "False False False False\nNone 1 65534\nRead-only file system\n"


def test_nothing_outlives_a_call(isolated, tmp_path):
    """A child in a session of its own, which no signal to a process group reaches."""
    mark = f"slime-orphan-{os.getpid()}"
    leave = (
        f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.execv('/bin/sleep', ['{mark}', '100'])\nprint('gone')"
    )
    assert run(leave).output == "gone\n"
    deadline = time.monotonic() + 5
    while (alive := _named(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive == []


def _named(word: str) -> list[str]:
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/cmdline", "rb") as file:
                if file.read().startswith(word.encode()):
                    found.append(process)
        except OSError:
            pass
    return found


def test_a_fork_bomb_stops_at_its_processes(isolated):
    code = """
import os, time
forks = 0
try:
    while os.fork():
        forks += 1
    time.sleep(100)
except BlockingIOError:
    print(forks < 8)
"""
    assert run(code).output.startswith("True")


def test_many_calls_run_side_by_side():
    async def both():
        sandbox = PythonSandbox(SMALL, at_once=4)
        return await asyncio.gather(*(sandbox.run(f"print({n})") for n in range(12)))

    assert [found.output for found in asyncio.run(both())] == [f"{n}\n" for n in range(12)]


ALONE = f"""
import asyncio, logging
from slime.rollout.agents.sandbox import Limits, PythonSandbox
logging.basicConfig()
limits = {SMALL}
try:
    asyncio.run(PythonSandbox(limits, isolation="required").run("print(1)"))
except RuntimeError as error:
    print(error)
sandbox = PythonSandbox(limits)
print(asyncio.run(sandbox.run("print(1)")), asyncio.run(sandbox.run("while True: pass")).exceeded)
"""


def test_where_the_kernel_gives_no_namespaces_limits_hold_alone_or_code_is_refused(isolated):
    """In a namespace whose kernel table allows no further one."""
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh", sys.executable, "-c", ALONE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "code of a policy cannot be isolated on this machine: namespaces are refused here" in done.stdout, done.stderr
    assert "Outcome(output='1\\n', status=0, exceeded='') cpu" in done.stdout, done.stdout
    assert done.stderr.count("but sees the network and this user's files") == 1
