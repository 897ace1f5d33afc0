"""tools/from_slime.py on launchers in the habits of the public slime: the verdict, the launcher for here, and no harm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.foreign_launchers import FOREIGN, IN_ITS_SCRIPTS, NO_COUNTERPART, Foreign
from tools import from_slime
from tools.foreign.confine import version
from tools.foreign.job import jobs_of
from tools.foreign.watch import Watched, watch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not version(), reason="this kernel has no Landlock, so that no foreign launcher is run")


def written(folder: Path, launcher: Foreign | str) -> Path:
    file = folder / "run-theirs.sh"
    file.write_text(launcher if isinstance(launcher, str) else launcher.text())
    return file


def watched(folder: Path, launcher: Foreign | str) -> Watched:
    return watch(written(folder, launcher), models=ROOT / "scripts" / "models")


def flags_of(launcher: Foreign) -> list[str]:
    """What its text says it passes, by reading the text: the cluster's words and those of the arrays, without the model's."""
    root = {"${BASE_FOLDER}": "/BASE_FOLDER", "${BASE_DIR}": "/BASE_DIR"}.get(launcher.root, launcher.root)
    words = [*launcher.cluster.split(), *(word for words in launcher.arrays.values() for word in words.split())]
    text = " ".join(words).replace("ROOT", root).replace("${WANDB_KEY}", "WANDB_KEY_OF_YOURS")
    text = text.replace("$SGLANG_CONFIG", "/root/configs/pd.yaml").replace(
        "$(seq 16 8 256)", " ".join(map(str, range(16, 257, 8)))
    )
    return text.split()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_launcher_of_a_family_that_is_here_parses_and_rehearses_with_its_flags_unchanged(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    launcher, output = FOREIGN[name], tmp_path / "ours.sh"
    [job] = jobs_of(watched(tmp_path, launcher))
    model = job.arrays["MODEL_ARGS"]
    expected = flags_of(launcher)
    cluster = len(launcher.cluster.split())
    assert list(job.words) == [*expected[:cluster], *model, *expected[cluster:]]
    words = [str(written(tmp_path, launcher)), "--output", str(output), "--gpu", launcher.gpu]
    assert from_slime.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("verdict: parses and rehearses with its flags unchanged")
    text = output.read_text()
    assert [one for one in launcher.reads if one not in text] == []
    assert not re.search(r"pkill|OF_YOURS|train\\.py|Megatron-LM", text)


@pytest.mark.parametrize("name", NO_COUNTERPART)
def test_what_has_no_counterpart_ends_in_one_line_that_names_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    launcher, said = NO_COUNTERPART[name]
    assert from_slime.main([str(written(tmp_path, launcher))]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("verdict: ") and said in last


def test_the_page_says_how_many_of_its_launchers_run() -> None:
    """Each is imitated by one that the tests above judge."""
    run, refused = ([name for name in IN_ITS_SCRIPTS.values() if name in table] for table in (FOREIGN, NO_COUNTERPART))
    assert (len(run), len(refused)) == (14, 2) and len(IN_ITS_SCRIPTS) == 16
    page = " ".join((ROOT / "docs/en/get_started/from_slime.md").read_text().split())
    assert "of the 16 launchers in its `scripts/` for NVIDIA GPUs whose model family is here, 14 run" in page
    kept = [name for name, imitation in IN_ITS_SCRIPTS.items() if imitation in NO_COUNTERPART]
    assert all(f"`{name}`" in page for name in kept), "and which do not"


@pytest.mark.parametrize("name", ["qwen3-4B", "qwen3-8B, a prefill and three decode engines", "qwen3-235B-A22B on 8 nodes"])
def test_the_written_launcher_passes_the_same_words_to_our_entry_point(name: str, tmp_path: Path) -> None:
    """Run with --rehearse, where launch.sh starts nothing; the Python that it calls prints its words."""
    launcher, output = FOREIGN[name], tmp_path / "ours.sh"
    [job] = jobs_of(watched(tmp_path, launcher))
    from_slime.main([str(written(tmp_path, launcher)), "--output", str(output)])
    checked = subprocess.run(["bash", "-n", str(output)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    told = tmp_path / "words"
    hook = f'run_python() {{ printf "%s\\n" "$@" >"{told}"; }}\n'
    output.write_text(output.read_text().replace("start_ray_head\n", f"{hook}start_ray_head\n"))
    variables = {"BASE_FOLDER": "/BASE_FOLDER", "WANDB_KEY": "WANDB_KEY_OF_YOURS", "MASTER_ADDR": "10.0.0.1", "REHEARSE": "1"}
    environment = {**os.environ, **variables, "RUN_DIR": str(tmp_path / "run"), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(output), "--num-rollout", "7"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    words = told.read_text().splitlines()
    assert words[:3] == ["-m", "slime.rehearse", "--runtime-env"]
    moved = [str(tmp_path / "run" / "pd.yaml") if word == "/root/configs/pd.yaml" else word for word in job.words]
    assert words[4:] == [*moved, "--num-rollout", "7"]
    given = json.loads(words[3])["env_vars"]
    assert given["PYTHONPATH"].split(":")[0] == str(ROOT)
    assert all(given[key] == value for key, value in job.environment.items() if key == "CUDA_DEVICE_MAX_CONNECTIONS")


HARMFUL = """#!/bin/bash
set -e
touch TARGET/made; rm -rf TARGET/kept; mv TARGET/kept TARGET/gone
/usr/bin/env touch TARGET/by-path
/bin/rm -rf TARGET/kept
/usr/bin/python3 -c "open('TARGET/python', 'w')"
BIN=/bin; $BIN/rm -rf TARGET/kept
"${BIN}/rm" -rf TARGET/kept
echo > TARGET/kept/file
: > TARGET/kept/file
{ echo x; } >> TARGET/kept/file
cat > TARGET/new.yaml <<EOF
a: $HOME
EOF
sed -i s/one/two/ TARGET/kept/file
awk 'BEGIN { system("rm -rf TARGET/kept"); print "x" > "TARGET/awk" }'
command rm -rf TARGET/kept; builtin kill -9 PARENT; kill -9 PARENT; pkill -9 python; killall python3
(exec /bin/rm -rf TARGET/kept)
bash -c "rm -rf TARGET/kept"; sh -c "touch TARGET/sh"; eval "touch TARGET/eval"
X=$(touch TARGET/substituted) ; while read -r line; do touch TARGET/loop; done < /etc/passwd
exec 3<>/dev/tcp/127.0.0.1/PORT && echo hello >&3
trap 'touch TARGET/trap' EXIT
python3 train.py --num-rollout 3
"""


def test_a_harmful_launcher_does_nothing_and_its_words_are_found_all_the_same(tmp_path: Path) -> None:
    import socket

    target = tmp_path / "target"
    (target / "kept").mkdir(parents=True)
    (target / "kept" / "file").write_text("one\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        text = (
            HARMFUL.replace("TARGET", str(target))
            .replace("PARENT", str(os.getpid()))
            .replace("PORT", str(server.getsockname()[1]))
        )
        seen = watched(tmp_path, text)
        if version() >= 4:
            with pytest.raises(TimeoutError):
                server.accept()
    assert [job.words for job in jobs_of(seen)] == [("--num-rollout", "3")]
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == ["kept", "kept/file"]
    assert (target / "kept" / "file").read_text() == "one\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("set -u\necho $NOWHERE\npython3 train.py\n", "NOWHERE: unbound variable"),
        ("[ -d /nowhere ] || { echo 'no /nowhere'; exit 3; }\npython3 train.py\n", "ended with status 3:\nno /nowhere"),
        ("echo hello\n", "starts no train.py:\nhello"),
    ],
)
def test_a_launcher_that_trains_nothing_is_told_with_its_last_words(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert from_slime.main([str(written(tmp_path, f"#!/bin/bash\n{text}"))]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python3 train.py --lr 1", "--lr 1"),
        ("/opt/conda/bin/python /root/slime/train.py --lr 1", "--lr 1"),
        ("PYTHONPATH=/x nohup python -u train.py --lr 1 > log.txt 2>&1 &\nwait", "--lr 1"),
        ("exec python3 train.py --lr 1", "--lr 1"),
        ("env A=1 python3 train.py --lr 1", "--lr 1"),
        ("if true; then python3 train.py --lr 1 2>&1 | tee log; fi", "--lr 1"),
        ('run() { python3 train.py "$@"; }; run --lr 1', "--lr 1"),
        ("until curl -sf http://x; do sleep 5; done; python3 train.py --lr 1", "--lr 1"),
        ("ray job submit --address=x --working-dir . -- python3 train.py --lr 1", "--lr 1"),
        ("ray job submit -- bash -c 'cd /root/slime && python3 train.py --lr 1 && echo done'", "--lr 1"),
        ("torchrun --nproc-per-node 8 train.py --lr 1", "--lr 1"),
        ("for lr in 1 2; do python3 train.py --lr $lr; done", "--lr 2"),
        ("A=(--lr 1)\nA+=(--seed 2)\npython3 train.py ${A[@]}", "--lr 1 --seed 2"),
        ("python3 -m slime.train --lr 1", "--lr 1"),
        ("LR=1; python3 train.py --lr ${LR:-3} --seed $((40 + 2))", "--lr 1 --seed 42"),
        ("ray job submit --runtime-env-json '' -- python3 train.py --lr 1", "--lr 1"),
    ],
)
def test_a_training_command_is_found_however_it_is_started(command: str, words: str, tmp_path: Path) -> None:
    assert list(jobs_of(watched(tmp_path, f"#!/bin/bash\nset -ex\n{command}\n"))[-1].words) == words.split()


def test_the_launchers_own_model_script_is_written_out_where_there_is_none_here(tmp_path: Path, capsys) -> None:
    """An unknown size of a known family: Qwen3 with 2 layers."""
    (tmp_path / "models").mkdir()
    mini = (ROOT / "scripts" / "models" / "qwen3-4B.sh").read_text().replace("--num-layers 36", "--num-layers 2")
    (tmp_path / "models" / "qwen3-mini.sh").write_text(mini)
    foreign = FOREIGN["qwen3-4B"]
    launcher = Foreign("qwen3-mini", {**foreign.arrays, "CKPT_ARGS": foreign.arrays["CKPT_ARGS"].replace("Qwen3-4B", "Mini")})
    assert from_slime.main([str(written(tmp_path, launcher)), "--output", str(tmp_path / "ours.sh")]) == 0
    text = (tmp_path / "ours.sh").read_text()
    assert "MODEL_ARGS=(\n   --num-layers 2\n" in text and 'source "${SLIME_ROOT}/scripts/models' not in text
    assert "model: scripts/models/qwen3-mini.sh beside the launcher" in capsys.readouterr().out
