"""Launchers in a plain shell: no environment active, any working directory, paths with spaces; the lines that they print work.

A project is laid out under a path with a space, with an environment of its own whose `ray` is recorded (test_launchers.py).
"""

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from slime.observability.owner import this_process
from tests.launchers.test_launchers import FAKE_RAY, FAKE_SSH, pairs

ROOT = Path(__file__).resolve().parents[2]


def hears_interrupts() -> None:
    """A shell cannot trap what it inherits as ignored, and a job in the background of a script inherits SIGINT so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Shell:
    """A plain shell on a machine with this project, its environment, and a BASE_DIR with checkpoints and data."""

    folder: Path

    @property
    def project(self) -> Path:
        return self.folder / "the project"

    @property
    def base(self) -> Path:
        return self.folder / "my base"

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": "/usr/bin:/bin", "HOME": str(self.folder), "CALLS": str(self.folder / "calls")}

    def start(self, command: str, *, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
        (self.folder / "calls").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", "-c", command], cwd=cwd or self.folder, env=self.environment | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears_interrupts,
        )  # fmt: skip

    def run(self, command: str, *, cwd: Path | None = None, status: int = 0, **environment: str) -> str:
        """What it says on stderr."""
        process = self.start(command, cwd=cwd, **environment)
        out, said = process.communicate(timeout=120)
        assert process.returncode == status, out + said
        return said

    def calls(self, *words: str) -> list[dict]:
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for line in lines if tuple((call := json.loads(line))["argv"][: len(words)]) == words]

    def job(self) -> tuple[list[str], dict[str, str]]:
        """(flags, environment) of the one job, which the project's own environment runs."""
        (call,) = self.calls("job", "submit")
        argv = call["argv"]
        python, *module = argv[argv.index("--") + 1 : argv.index("--") + 4]
        # By a link of the run's own folder: Ray would break at the space in the environment's path.
        assert python.endswith("/env/bin/python") and not re.search(r"\s", python) and module == ["-m", "slime.train"]
        return argv[argv.index("--") + 4 :], json.loads(argv[argv.index("--runtime-env-json") + 1])["env_vars"]


def make_environment(folder: Path) -> None:
    """A virtual environment with the packages of this one, and programs of its own."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    (folder / "lib").symlink_to(Path(sys.prefix) / "lib")
    (folder / "syslib").mkdir()
    home = Path(sys.executable).resolve().parent
    (folder / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    for name, text in (("ray", FAKE_RAY), ("ssh", FAKE_SSH)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    made = Shell(tmp_path)
    made.project.mkdir()
    shutil.copytree(ROOT / "scripts", made.project / "scripts")
    for name in ("slime", "slime_plugins", "tools"):
        (made.project / name).symlink_to(ROOT / name)
    make_environment(made.project / ".venv")
    for model in ("GLM-5.2", "Qwen3-4B"):
        (made.base / f"{model}_torch_dist").mkdir(parents=True)
        (made.base / f"{model}_torch_dist" / "latest_checkpointed_iteration.txt").write_text("release")
    (made.base / "GLM-5.2-FP8").mkdir()
    (made.base / "Qwen3-4B").mkdir()
    for data in ("dapo-math-17k/dapo-math-17k.jsonl", "aime-2024/aime-2024.jsonl"):
        (made.base / data).parent.mkdir()
        (made.base / data).write_text('{"prompt": "1+1=", "label": "2"}\n')
    return made


QWEN = "bash 'the project/scripts/run-qwen3-4B.sh'"
GLM = "bash 'the project/scripts/run-glm5.2-744B-A40B.sh'"


def continued(said: str) -> str:
    return re.findall(r"to continue from the newest checkpoint.*?: (.*)", said)[-1]


def test_a_plain_shell_runs_a_launcher_and_the_line_that_it_prints(shell: Shell):
    said = shell.run(f"BASE_DIR='my base' RUN_DIR='my base/run 1' {QWEN} --num-rollout 4 --custom-rm-path 'my.rm'")
    first, environment = shell.job()
    assert pairs(first)["--hf-checkpoint"] == str(shell.base / "Qwen3-4B")
    assert environment["SLIME_RUN_DIR"] == str(shell.base / "run 1")
    assert environment["TENSORBOARD_DIR"] == str(shell.base / "run 1" / "tensorboard") and "--use-tensorboard" in first
    assert shell.calls("start", "--head")[0]["all"]["LD_LIBRARY_PATH"].split(":")[0] == str(shell.project / ".venv" / "syslib")
    elsewhere = shell.folder / "else where"
    elsewhere.mkdir()
    again = continued(said)
    shell.run(again, cwd=elsewhere)
    second, same = shell.job()
    assert same == environment and second[: len(first) - 4] == first[: len(first) - 4]
    assert second[-4:] == ["--custom-rm-path", "my.rm", "--num-rollout", "8"], "twice the rollouts, and the caller's flags"


def test_a_copied_launcher_names_itself_and_what_it_was_given(shell: Shell):
    copy = shell.project / "scripts" / "my run.sh"
    shutil.copy(shell.project / "scripts" / "run-qwen3-4B.sh", copy)
    again = continued(shell.run("bash 'the project/scripts/my run.sh'", BASE_DIR="my base", SEED="7", EVAL_DATA=""))
    for part in (f"BASE_DIR={str(shell.base).replace(' ', chr(92) + ' ')} ", "SEED=7 ", "EVAL_DATA='' ", "my\\ run.sh"):
        assert part in again
    shell.run(again, cwd=Path("/"))
    assert "--eval-interval" not in shell.job()[0], "an empty EVAL_DATA stays empty"


def test_a_job_that_fails_is_continued_by_the_same_command_and_its_logs_stay(shell: Shell):
    said = shell.run(f"{QWEN} --num-rollout 4", status=3, BASE_DIR="my base", JOB_STATUS="3")
    assert continued(said).endswith("run-qwen3-4B.sh --num-rollout 4")
    kept = re.search(r"is stopped; its logs: (/tmp/slime-ray-\w+)", said)[1]
    assert (Path(kept) / "head.log").is_file()
    shutil.rmtree(kept)


def test_nothing_is_left_of_a_run_that_ended_well_and_nobody_else_could_read_it(shell: Shell):
    said = shell.run(QWEN, BASE_DIR="my base")
    folder = Path(re.search(r"logs (/tmp/slime-ray-\w+)", said)[1])
    (head,) = shell.calls("start", "--head")
    assert head["mode"] == stat.S_IRWXU and Path(head["all"]["TMPDIR"]).parent == folder
    assert not folder.exists()
    assert not (shell.base / "Qwen3-4B_slime" / ".slime-owner").exists()


def test_what_the_shell_inherited_for_another_cluster_is_not_used(shell: Shell):
    inherited = {"RAY_ADDRESS": "10.9.9.9:1", "RAY_API_SERVER_ADDRESS": "http://10.9.9.9:2", "RAY_NAMESPACE": "theirs"}
    said = shell.run(QWEN, BASE_DIR="my base", PASS_ENV="RAY_worker_niceness", RAY_worker_niceness="0", **inherited)
    assert "not used: RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_NAMESPACE (" in said
    for call in shell.calls():
        assert not set(inherited) & set(call["all"])
    assert shell.calls("start", "--head")[0]["all"]["RAY_worker_niceness"] == "0", "what PASS_ENV names is passed"


def test_variables_reach_every_rank_or_are_named(shell: Shell):
    said = shell.run(
        GLM, BASE_DIR="my base", MASTER_ADDR="127.0.0.1", RAY_PORT=str(free_port()), RAY_DASHBOARD_PORT=str(free_port()),
        NUM_NODES="16", NCCL_DEBUG="INFO", NCCL_IB_HCA="mlx5", NCCL_P2P_LEVEL="SYS", PASS_ENV="NCCL_IB_HCA NCCL_MIN_CTAS=8",
    )  # fmt: skip
    flags, environment = shell.job()
    wanted = {"NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5", "NCCL_MIN_CTAS": "8", "NCCL_P2P_LEVEL": "NVL"}
    assert {name: environment.get(name) for name in wanted} == wanted
    assert "they would reach this node alone: NCCL_P2P_LEVEL (PASS_ENV=" in said
    assert "NCCL_P2P_LEVEL" not in shell.calls("start", "--head")[0]["all"]
    # 16 nodes are 128 GPUs: one prefill and one decode engine of 64, and half the context-parallel ranks.
    assert pairs(flags)["--context-parallel-size"] == "4" and pairs(flags)["--expert-model-parallel-size"] == "16"
    assert re.findall(r"num_gpus: (\d+)", Path(pairs(flags)["--sglang-config"]).read_text()) == ["64", "64"]


def test_a_secret_goes_to_every_rank_by_environment_alone(shell: Shell):
    """Arguments are everybody's on the node, a job's description is kept by Ray, and "to continue" is printed."""
    exported = {"HF_TOKEN": "of-the-hub", "OPENAI_APIKEY": "of-the-judge"}
    said = shell.run(
        QWEN, BASE_DIR="my base", PASS_ENV="HF_TOKEN OPENAI_APIKEY MY_PASSWORD=of-mine TOKENIZERS_PARALLELISM=true", **exported
    )  # fmt: skip
    secrets = exported | {"MY_PASSWORD": "of-mine"}
    _, described = shell.job()
    assert described["TOKENIZERS_PARALLELISM"] == "true" and not set(secrets) & set(described)
    for call in shell.calls():
        assert [value for value in secrets.values() if value in " ".join(call["argv"])] == []
    # Ray's workers, the job among them, have the environment of the node's Ray.
    assert shell.calls("start", "--head")[0]["all"].items() >= secrets.items()
    assert "PASS_ENV=HF_TOKEN\\ OPENAI_APIKEY\\ MY_PASSWORD\\ TOKENIZERS_PARALLELISM=true" in said
    assert [value for value in secrets.values() if value in said] == []


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PASS_ENV": "NOT_SET_HERE"}, "PASS_ENV names NOT_SET_HERE, which is not set here"),
        ({"SLIME_VENV": "/nowhere"}, "SLIME_VENV=/nowhere is no environment"),
        ({"PYTHON": "/usr/bin/env"}, "/usr/bin/env has no ray, so it is not an environment of this project"),
        ({"RAY_TEMP_DIR": "/tmp/" + 40 * "a"}, "Ray's sockets below it leave room for 37"),
        ({"TMPDIR": "/nowhere"}, "TMPDIR=/nowhere is no folder that can be written to"),
        ({"MASTER_ADDR": "no-such-host.invalid"}, "no address is known for no-such-host.invalid"),
    ],
)
def test_what_cannot_work_is_one_line_at_once(shell: Shell, environment: dict[str, str], said: str):
    lines = shell.run(QWEN, status=1, BASE_DIR="my base", **environment).splitlines()
    assert said in lines[-1] and len(lines) == 1
    assert shell.calls() == []


def test_conditions_that_used_to_hang_are_taken_care_of(shell: Shell):
    said = shell.run(
        f"bash {str(shell.project / 'scripts' / 'run-qwen3-4B.sh')!r}", cwd=shell.project / "slime", BASE_DIR=str(shell.base),
        TMPDIR="/tmp/" + 90 * "a", http_proxy="http://10.1.1.1:3128",
    )  # fmt: skip
    (head,) = shell.calls("start", "--head")
    assert len(head["all"]["TMPDIR"]) < 30 and "TMPDIR has 95 characters" in said
    assert {"127.0.0.1", "localhost"} <= set(head["all"]["no_proxy"].split(","))


def test_a_working_directory_that_hides_a_package_is_named(shell: Shell):
    (shell.folder / "types.py").write_text("")
    (shell.folder / "ray").mkdir()
    (shell.folder / "ray" / "__init__.py").write_text("")
    said = shell.run(QWEN, status=1, BASE_DIR="my base")
    assert f"the working directory {shell.folder} holds ray, types, which would hide" in said


def test_a_hostfile_from_windows_with_names_gives_addresses(shell: Shell):
    hosts = "127.0.0.1 slots=8\r\n# more\r\n" + "".join(f"127.0.0.{n}\r\n" for n in range(2, 17)) + "localhost\r\n"
    (shell.folder / "hosts").write_text("\ufeff" + hosts)
    shell.run(
        GLM, BASE_DIR="my base", MASTER_ADDR="localhost", HOSTFILE="hosts", NUM_NODES="16",
        RAY_PORT=str(free_port()), RAY_DASHBOARD_PORT=str(free_port()),
    )  # fmt: skip
    calls = [json.loads(line) for line in Path(f"{shell.folder / 'calls'}.ssh").read_text().splitlines()]
    joined = [call for call in calls if "ray start" in call["stdin"]]
    assert sorted(call["argv"][-3] for call in joined) == sorted(f"127.0.0.{n}" for n in range(2, 17))
    assert "--node-ip-address 127.0.0.2 " in next(c["stdin"] for c in joined if c["argv"][-3] == "127.0.0.2") + " "
    head = shell.calls("start", "--head")[0]["argv"]
    assert head[head.index("--node-ip-address") + 1] == "127.0.0.1"


def wait_for(what, patience: float = 60.0):
    deadline = time.monotonic() + patience
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_second_launcher_is_refused_and_one_that_was_killed_leaves_nothing(shell: Shell):
    first = shell.start(f"exec {QWEN}", BASE_DIR="my base", JOB_SECONDS="100")
    wait_for(lambda: shell.calls("job", "submit"))
    head = shell.calls("start", "--head")[0]["pid"]
    second = subprocess.run(
        ["bash", "-c", QWEN], cwd=shell.folder, env=shell.environment | {"BASE_DIR": "my base"}, capture_output=True, text=True
    )
    assert second.returncode == 1
    assert f"SAVE {shell.base / 'Qwen3-4B_slime'} belongs to another run, pid {first.pid} on " in second.stderr
    folder = next(Path(call["all"]["TMPDIR"]).parent for call in shell.calls("start", "--head"))
    first.send_signal(signal.SIGKILL)
    said = first.communicate(timeout=60)[1]
    assert f"[launch] the launcher (pid {first.pid}) was killed without a word: what it started is being ended" in said
    assert not alive(head) and not (folder / "tmp").exists() and (folder / "head.log").exists()
    assert not (shell.base / "Qwen3-4B_slime" / ".slime-owner").exists()
    shell.run(QWEN, BASE_DIR="my base")
    shutil.rmtree(folder, ignore_errors=True)


KILLED = """
import json, os, pathlib, signal
folder = pathlib.Path(os.environ["SAVES"])
folder.mkdir()
(folder / ".slime-owner").write_text(json.dumps({"launch": os.environ["SLIME_LAUNCH"], "pid": os.getpid()}))
(folder / "checkpoint").touch()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_folder_of_a_driver_that_was_killed_is_given_back(shell: Shell):
    fake = shell.folder / "fake" / "slime"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "train.py").write_text(KILLED)
    saves = shell.folder / "saves"
    process = shell.start(f"exec {QWEN} --save {saves}", BASE_DIR="my base", DRIVER=str(fake.parent), SAVES=str(saves))
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0, said
    assert [file.name for file in saves.iterdir()] == ["checkpoint"], said
    shutil.rmtree(re.search(r"its logs: (/tmp/slime-ray-\w+)", said)[1])


DRIVER = """
import os, signal, sys, time

def leave(*_):
    open(os.environ["ASKED"], "w").close()
    time.sleep(float(os.environ["SAVING"]))
    sys.exit(int(os.environ["STATUS"]))

signal.signal(signal.SIGTERM, leave)
print("training", flush=True)
open(os.environ["READY"], "w").close()
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("sent", "saving", "leaves_with", "status"),
    [
        (["TERM"], 2, 0, 0),
        (["USR1"], 0, 0, 0),
        (["INT"], 0, 1, 1),  # the driver could not save
        (["TERM", "TERM"], 60, 0, 143),
    ],
)
def test_a_preempted_launcher_waits_for_the_save_and_a_second_signal_does_not(shell: Shell, sent, saving, leaves_with, status):
    fake = shell.folder / "fake" / "slime"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "train.py").write_text(DRIVER)
    ready, asked = shell.folder / "ready", shell.folder / "asked"
    process = shell.start(
        f"exec {QWEN} --save-on-signal", BASE_DIR="my base", DRIVER=str(fake.parent), READY=str(ready), ASKED=str(asked),
        SAVING=str(saving), STATUS=str(leaves_with),
    )  # fmt: skip
    wait_for(ready.exists)
    process.send_signal(getattr(signal, f"SIG{sent[0]}"))
    wait_for(asked.exists)
    for name in sent[1:]:
        process.send_signal(getattr(signal, f"SIG{name}"))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == status, said
    assert f"{sent[0]}: the job is asked to save and leave; a second signal ends it at once" in said
    assert continued(said), "by the same command, not by one with more rollouts"
    if status:
        shutil.rmtree(re.search(r"its logs: (/tmp/slime-ray-\w+)", said)[1])


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


def test_a_machine_that_was_started_anew_waits_until_its_own_record_is_stale(shell: Shell):
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


def test_a_node_is_joined_once_by_the_line_that_is_printed_and_its_keeper_outlives_its_ray(shell: Shell, tmp_path: Path):
    process = shell.start(
        f"exec {GLM}", BASE_DIR="my base", RUN_DIR="my base/run", MASTER_ADDR="127.0.0.1", NUM_NODES="16", JOB_SECONDS="100",
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
    node = subprocess.Popen(["bash", str(script)], env=shell.environment | {"RAY_ADDRESS": "theirs"}, cwd="/")
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
    wait_for(lambda: not launched.exists())
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
    """Ray itself may count on such a head for minutes: here it is a process that waits for ever."""
    launch, keeper = "e" * 32, str(ROOT / "scripts" / "lib" / "keeper.sh")
    ray = subprocess.Popen(["sleep", "600"], env=os.environ | {"SLIME_LAUNCH": launch}, start_new_session=True)
    with socket.create_server(("127.0.0.1", 0)) as head:
        told = {"HEAD_OF_RUN": f"127.0.0.1:{head.getsockname()[1]}", "HEAD_SECONDS": "1"}
        keeps = subprocess.Popen(["bash", keeper, str(ray.pid), launch, str(tmp_path), ""], env=os.environ | told)
        for _ in range(2):
            head.accept()[0].close()
        assert ray.poll() is None
    assert ray.wait(60) == -signal.SIGTERM
    assert keeps.wait(60) == 0


def test_help_is_the_launchers_heading_and_starts_nothing(shell: Shell):
    process = shell.start(f"{QWEN} --help")
    told, said = process.communicate(timeout=60)
    assert process.returncode == 0 and said == "" and shell.calls() == []
    assert told.startswith("Qwen3-4B: GRPO on one node") and "BASE_DIR   folder with Qwen3-4B" in told
    flags = re.search(r"FLAGS: (.*)", told)[1]
    listing = shell.start(flags, cwd=shell.project)
    assert "--rollout-batch-size" in listing.communicate(timeout=60)[0]


TOOL = """
import sys
print("reading", flush=True)
sys.stderr.write("no config.json in /x; name a folder that has one\\n")
if sys.argv[1] == "bug":
    raise KeyError("gold")
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("end", "frames"), [("2", 0), ("bug", 1)])
def test_what_a_tool_says_is_not_buried_under_torchruns_traceback(shell: Shell, end: str, frames: int):
    (shell.folder / "tool.py").write_text(TOOL)
    source = f". {shlex.quote(str(shell.project / 'scripts' / 'lib' / 'launch.sh'))}"
    lines = shell.run(f"set -euo pipefail; {source}; run_ranks 1 '{shell.folder}/tool.py' {end}", status=1).splitlines()
    assert lines[0] == "no config.json in /x; name a folder that has one"
    assert lines[-1] == "[launch] error: tool.py failed, as said above; nothing else was started"
    assert "\n".join(lines).count("Traceback") == frames, "its own, where it has one"
    assert frames == 1 or len(lines) == 2


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]


def test_documented_commands_work_as_they_are_printed(shell: Shell):
    """Each command of the pages for the first hour, in a plain shell in the project: launchers prove their flags, which
    runs all of a launcher but the job; Python's commands are those of the environment."""
    lines = []
    for page in ("README.md", "docs/en/get_started/quick_start.md", "docs/en/get_started/data.md"):
        lines += commands(ROOT / page)
    launched = [line for line in lines if re.match(r"([A-Z]\w*=\S+ )*bash scripts/run-", line)]
    assert len(launched) >= 3
    for line in launched:
        shell.run(f"export REHEARSE=1; {line} --quick", cwd=shell.project)
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    everywhere = [line for page in pages for line in commands(page)]
    bare = [line for line in everywhere if re.match(r"(python3?|torchrun|tensorboard|ray|hf) ", line)]
    assert bare == [], "a plain shell has none of them: write .venv/bin/..."
    called = [line for line in lines if line.startswith(".venv/bin/python ") and "<<" not in line]
    assert called
    for line in called:
        shell.run(line, cwd=shell.project)
