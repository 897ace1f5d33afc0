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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

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
        (made.base / f"{model}_torch_dist" / "release").mkdir(parents=True)
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
    # The driver has folders of its own; the last is not this launch's, as where a driver is refused.
    saves = [shell.folder / "my saves", shell.folder / "more saves", shell.folder / "somebody's"]
    flags = shlex.join(["--save", str(saves[0]), f"--save={saves[1].name}", "--save", str(saves[2])])
    first = shell.start(f"exec {QWEN} {flags}", BASE_DIR="my base", JOB_SECONDS="100")
    wait_for(lambda: shell.calls("job", "submit"))
    launch = shell.calls("job", "submit")[0]["all"]["SLIME_LAUNCH"]
    for folder, owner in zip(saves, (launch, launch, "another"), strict=True):
        folder.mkdir()
        (folder / ".slime-owner").write_text(json.dumps({"launch": owner, "pid": 1}))
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
    assert [(folder / ".slime-owner").exists() for folder in saves] == [False, False, True]
    shell.run(QWEN, BASE_DIR="my base")
    shutil.rmtree(folder, ignore_errors=True)


def test_a_launcher_or_driver_that_is_stopped_is_told_and_that_it_goes_on(tmp_path: Path):
    (tmp_path / "slime").mkdir()
    (tmp_path / "slime" / "__init__.py").touch()
    (tmp_path / "slime" / "train.py").write_text("import time; time.sleep(100)")
    environment = os.environ | {"SLIME_LAUNCH": "f" * 32}
    driver = subprocess.Popen([sys.executable, "-m", "slime.train"], cwd=tmp_path, env=environment)
    launcher = subprocess.Popen(["sleep", "100"], env=environment)
    command = ["bash", str(ROOT / "scripts" / "lib" / "keeper.sh"), str(launcher.pid), "f" * 32, "", ""]
    with (tmp_path / "said").open("w") as file:
        keeper = subprocess.Popen(command, stderr=file, start_new_session=True)

    def said(after: int = 0) -> list[str]:
        return (tmp_path / "said").read_text().splitlines()[after:]

    for pid, name in ((driver.pid, "the job's driver"), (launcher.pid, "the launcher")):
        before = len(said())
        os.kill(pid, signal.SIGSTOP)
        (line,) = wait_for(partial(said, before))
        assert line.startswith(
            f"[launch] {name} (pid {pid}) is stopped (SIGSTOP, or a debugger; kill -CONT {pid} there lets it"
        )
        os.kill(pid, signal.SIGCONT)
        assert f"[launch] {name} (pid {pid}) goes on, after " in wait_for(partial(said, before + 1))[0]
    launcher.kill()
    launcher.wait()
    assert driver.wait(60) == -signal.SIGTERM and keeper.wait(60) == 0


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
