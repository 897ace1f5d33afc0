"""The other nodes of a launch: how they join, when they are refused, and that nothing stays on them without the head."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from slime.observability.owner import this_process
from tests.launchers.test_plain_shell import GLM, QWEN, ROOT, Shell, alive, continued, free_port, shell, wait_for  # noqa: F401

TOO_BUSY = "echo one >>tries; [[ $(wc -l <tries)"
TIMED_OUT = "echo 'Exception: The current node timed out during startup. This could happen because ...'; exit 1"
MISMATCH = """Version mismatch: The cluster was started with:
    Ray: 2.60.0
    Python: 3.11.7
This process on node 10.0.0.2 was started with:
    Ray: 2.40.0
    Python: 3.11.7"""


@pytest.mark.parametrize(
    ("ray", "most", "status", "out", "line"),
    [
        ("sleep 1; echo Ray runtime started.; sleep 20", 20, 0, r"\d+\n", r"^$"),
        ("echo no route to the head >&2; exit 1", 20, 1, "", r"^no route to the head$"),
        (
            f"sleep 1; echo '{MISMATCH}'; exit 1",
            20,
            1,
            "",
            r"^Version mismatch: .* Ray: 2\.60\.0 .* on node 10\.0\.0\.2 .* Ray: 2\.40\.0 ",
        ),
        (f"{TOO_BUSY} -lt 3 ]] || {{ echo Ray runtime started.; sleep 20; exit; }}; {TIMED_OUT}", 20, 0, r"\d+\n", r"^$"),
        (f"{TOO_BUSY} -lt 4 ]] || exit 7; {TIMED_OUT}", 20, 1, "", "^Exception: The current node timed out during startup"),
        ("echo connecting; sleep 20", 2, 1, "", r"^Ray has not come up there within 2 s; its last line: connecting$"),
    ],
)
def test_a_node_has_joined_when_its_ray_is_up_and_says_why_it_is_not(ray, most, status, out, line, tmp_path: Path):
    text = (ROOT / "scripts" / "lib" / "cluster.sh").read_text()
    script = re.search(r"^JOINED_OR_WHY='(.*?)'$", text, re.MULTILINE | re.DOTALL)[1]
    members = re.search(r"^session_members\(\).*?^}$", text, re.MULTILINE | re.DOTALL)[0]
    start = (
        f"log={tmp_path}/head.log most={most}; cd {tmp_path}; {members}\nguard() {{ touch guarded; }}\n"
        f"join() {{ setsid bash -c {shlex.quote(ray)} >$log 2>&1 </dev/null & pid=$!; }}\n"
    )
    done = subprocess.run(["bash"], input=start + script, capture_output=True, text=True, timeout=60)
    if status == 0:
        os.killpg(int(done.stdout), signal.SIGKILL)
    assert done.returncode == status and re.fullmatch(out, done.stdout), done
    assert (tmp_path / "guarded").exists(), "whatever is left there is taken away"
    assert re.search(line, (done.stderr.splitlines() or [""])[-1]), done.stderr


@pytest.mark.parametrize(
    ("hosts", "head", "said"),
    [
        (b"\xef\xbb\xbf10.0.0.2\r\n", "10.0.0.1", "10.0.0.1 and 10.0.0.2"),
        (b"127.0.0.2\n", "127.0.0.1", "127.0.0.1 and 127.0.0.2"),
        ("10.0.0.2\n".encode("utf-16"), "10.0.0.1", "it is no UTF-8 text; give a text file, one node address per line"),
        (b"10.0.2\n", "10.0.0.1", "no address is known for 10.0.2 ('10.0.2' does not appear to be"),
        (b"10.0.0.02\n", "10.0.0.1", "no address is known for 10.0.0.02"),
        (b"0.0.0.0\n", "10.0.0.1", "0.0.0.0 is no other node's address"),
        (b"127.0.0.1\n", "10.0.0.1", "127.0.0.1 is no other node's address; give each node's own"),
    ],
)
def test_an_address_of_hostfile_is_another_nodes_or_named(hosts: bytes, head: str, said: str, tmp_path: Path):
    (tmp_path / "hosts").write_bytes(hosts)
    script = (
        'die() { echo "$*"; exit 1; }; source scripts/lib/nodes.sh; check_hostfile 2; '
        'echo "$MASTER_ADDR and ${WORKER_ADDRESSES[*]}"'
    )
    env = {**os.environ, "PYTHON": sys.executable, "REHEARSE": "0", "MASTER_ADDR": head, "HOSTFILE": str(tmp_path / "hosts")}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert said in done.stdout and not done.stderr


def test_a_machine_that_was_started_anew_waits_until_its_own_record_is_stale(shell: Shell):  # noqa: F811
    """Its process number means nothing any more, and a run that lives elsewhere under this name says so every half minute."""
    folder = shell.base / "Qwen3-4B_slime"
    folder.mkdir()
    gone = replace(this_process(), launch="of-the-machine-before", pid=7, machine="another boot")
    record = folder / ".slime-owner"
    record.write_text(json.dumps(asdict(gone)))
    os.utime(record, (time.time() - 174, time.time() - 174))
    said = shell.run(QWEN, BASE_DIR="my base")
    assert (
        f"waiting for what an earlier launch left: SAVE {folder} belongs to another run, pid 7 on {socket.gethostname()}"
        in said
    )


def test_a_node_is_joined_once_by_the_line_that_is_printed_and_its_keeper_outlives_its_ray(shell: Shell, tmp_path: Path):  # noqa: F811
    process = shell.start(
        f"exec {GLM}", BASE_DIR="my base", RUN_DIR="my base/run", MASTER_ADDR="127.0.0.1", NUM_NODES="16", JOB_SECONDS="900",
        RAY_PORT=str(free_port()), RAY_DASHBOARD_PORT=str(free_port()),
    )  # fmt: skip
    wait_for(lambda: shell.calls("job", "submit"))
    script = shell.base / "run" / "join.sh"
    assert stat.S_IMODE(script.stat().st_mode) == 0o600
    twice = subprocess.run(["bash", str(script)], env=shell.environment, capture_output=True, text=True)
    told = "this machine has joined this cluster already, maybe by another address: leave it out\n"
    assert (twice.returncode, twice.stderr) == (1, told)
    # Another machine has a folder of its own at that path, and none of the launcher's processes.
    (there := tmp_path / "there").mkdir()
    folder = re.search(r"^folder=(\S+)$", script.read_text(), re.MULTILINE)[1]
    launch, other = re.search(r"^export SLIME_LAUNCH=(\w+)$", script.read_text(), re.MULTILINE)[1], "f" * 32
    script.write_text(script.read_text().replace(folder, str(there)).replace(launch, other))
    node = subprocess.Popen(
        ["bash", str(script)], env=shell.environment | {"RAY_ADDRESS": "theirs", "HEAD_SECONDS": "900"}, cwd="/"
    )
    (joined,) = wait_for(lambda: shell.calls("start", "--block"))
    assert joined["argv"][joined["argv"].index("--address") + 1].startswith("127.0.0.1:")
    (head,) = shell.calls("start", "--head")
    twice = subprocess.run(["bash", str(script)], env=shell.environment, capture_output=True, text=True)
    assert (twice.returncode, twice.stderr) == (1, told)
    # The launcher cannot reach this machine; what carries the launch's name there ends with the machine's Ray.
    stray = subprocess.Popen(["sleep", "600"], env=os.environ | {"SLIME_LAUNCH": other}, start_new_session=True)
    # Its launch has not been ended by anybody, so that it has the last word on it; the launcher's own has not come to that.
    launched, console = (shell.base / "run" / name for name in (".launched", "console.log"))
    assert re.fullmatch(r"\w{32}\n", launched.read_text()) and launch in launched.read_text()
    launched.write_text(f"{other}\n")
    # An engine that died with its node's Ray left a file, which is on the list that engines keep beside the logs.
    left = Path(f"/dev/shm/sglang_{other}_{os.getpid()}")
    left.touch()
    (shell.base / "run" / "default-decode-1-0.shared").write_text(f"{left}\n")
    os.kill(joined["pid"], signal.SIGKILL)
    assert stray.wait(60) == -signal.SIGTERM
    wait_for(lambda: not launched.exists(), patience=180)
    assert not left.exists()
    assert re.search(r"node 127\.0\.0\.1 is gone or out of reach, and with it Ray's head, starting: ", console.read_text())
    assert joined["env"] == head["env"] | {"RAY_AUTH_TOKEN_PATH": str(there / "token")} and "RAY_ADDRESS" not in joined["all"]
    assert joined["token"] == head["token"] and len(head["token"]) == 64
    assert head["token"] not in " ".join(joined["argv"])
    process.terminate()
    said = process.communicate(timeout=60)[1]
    node.wait(60)
    assert f"on each of the other 15 nodes: bash {str(script).replace(' ', chr(92) + ' ')}" in said
    assert process.returncode == 143 and not script.exists() and continued(said)
    shutil.rmtree(re.search(r"its logs: (/tmp/slime-ray-\w+)", said)[1])


def test_a_node_whose_head_is_out_of_reach_ends_what_the_launch_has_there(tmp_path: Path):
    """Ray itself may count on such a head for minutes: here it is a process that waits for ever, and one that has no launch."""
    launch, keeper = "e" * 32, str(ROOT / "scripts" / "lib" / "keeper.sh")
    script = "env -i sleep 600 & echo $!; wait"
    ray = subprocess.Popen(
        ["bash", "-c", script],
        env=os.environ | {"SLIME_LAUNCH": launch},
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    agent = int(ray.stdout.readline())
    with socket.create_server(("127.0.0.1", 0)) as head:
        told = {"HEAD_OF_RUN": f"127.0.0.1:{head.getsockname()[1]}", "HEAD_SECONDS": "1"}
        keeps = subprocess.Popen(["bash", keeper, str(ray.pid), launch, str(tmp_path), ""], env=os.environ | told)
        for _ in range(2):
            head.accept()[0].close()
        assert ray.poll() is None
    assert ray.wait(60) == -signal.SIGTERM
    assert keeps.wait(60) == 0 and not alive(agent)
