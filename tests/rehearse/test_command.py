"""The door itself: exit status, files, the page, speed, and that a laptop without torch is enough."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slime.rehearse.command import OWN, main
from slime.rehearse.own_flags import split_own
from slime.weights.digest import KEY_VARIABLE, rehearsed_digest
from tests.rehearse.recipes import ROOT, Recipe
from tools.bench.weight_sync import flagship_plan

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Checks nesting and collects what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.counts: dict[str, int] = {}
        self.titles: list[str] = []
        self.hints: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [
            f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")
        ]
        self.titles += [value for name, value in attrs if name == "aria-label"]
        self.hints += [value for name, value in attrs if name == "title"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_the_page_is_whole_and_loads_nothing(flagship: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page, data, table = tmp_path / "r.html", tmp_path / "r.json", tmp_path / "map.tsv"
    env = json.dumps({"env_vars": flagship.env})
    own = [
        "--no-ranks",
        "--html",
        str(page),
        "--json",
        str(data),
        "--weight-map",
        str(table),
        "--runtime-env",
        env,
        "--engine-version",
        "0.5.23",
    ]
    assert main([*own, *flagship.written(tmp_path)]) == 0
    assert "launchable" in capsys.readouterr().out.splitlines()[-1]
    read = Page()
    read.feed(page.read_text())
    assert (
        read.open == []
        and read.loads == []
        and "script" not in read.counts
        and "@import" not in page.read_text()
        and "url(" not in page.read_text()
    )
    assert read.titles == [
        "ranks by stage and memory",
        "stage balance",
        "memory by phase and stage",
        "main memory of a node",
        "iteration timeline",
        "weight flow",
        "rounds of a weight sync",
    ]
    assert [hint.split(":")[0] for hint in read.hints if hint.startswith("rank ")] == [f"rank {rank}" for rank in range(256)]
    result = json.loads(data.read_text())
    assert (
        result["launchable"]
        and result["grid"]["dp"] == 1
        and result["stages"]["best"]["layers"]
        and result["weights"]["tensors"] == 58_794
    )
    planned, phase = result["sync_plan"], next(one for one in result["cost"]["phases"] if one["name"] == "weight sync")
    # The plan that the flags ask for is that of the layout written down by hand.
    assert planned["digest"] == flagship_plan(limit_bytes=2 << 30).digest
    assert phase["seconds"] == pytest.approx(planned["seconds"] + 0.45), "sync_steps_s"
    # 31.96 GB at 50 GB/s; all but the first round's way is hidden behind it.
    assert planned["load_seconds"] == pytest.approx(31.96 / 50, rel=1e-3)
    assert planned["seconds"] - planned["load_seconds"] == pytest.approx(sum(planned["rounds"][0]["hops"]))
    assert planned["seconds"] == pytest.approx(0.66, abs=0.005) and planned["wire_seconds"] < 0.4
    assert "14.9 s" in phase["why"] and planned["most_tensors"] < 3_700
    lines = table.read_text().splitlines()
    # 154,880 rows over TP 4, each part on 8 context-parallel ranks of stage 0, which is ranks 0 to 31; each keeps its own.
    parts = ["rows 0:38720@0-28/4", "rows 38720:77440@1-29/4", "rows 77440:116160@2-30/4", "rows 116160:154880@3-31/4"]
    [first] = [line.split("\t") for line in lines if line.startswith("model.embed_tokens.weight\t")]
    number, places = first.pop(6), ["154880x6144", "-", "0", ";".join(parts), "0-31", "0-3:all@0-63", "-"]
    assert len(lines) == 58_794 and first == ["model.embed_tokens.weight", *places, str(154880 * 6144 * 2)]
    assert [int(line.split("\t")[6]) for line in lines] == sorted(int(line.split("\t")[6]) for line in lines)
    assert 0 <= int(number) < 16 == len(planned["rounds"])
    # Layer 77 is of stage 7; of 8 experts per rank the last 8 lie on rank 31 of the stage. Engines have 4 per rank.
    [last] = [line for line in lines if line.startswith("model.layers.77.mlp.experts.255.down_proj.weight\t")]
    assert "\t6144x2048\tfp8\t7\tall@255\t255\t15\t0-3:all@63\tshard\t" in last
    places, sent = result["weights"]["places"], result["weights"]["sent"]
    assert sum(place["tensors"] for place in places) == sum(bucket["tensors"] for bucket in sent) == 58_794
    # Of 8 stages each has, of every expert rank, one place per 2 engine ranks; 3 dense layers have no experts.
    assert len([place for place in places if place["kept_by"].endswith(("@0", "@63"))]) == 8 * 2
    assert sum(bucket["bytes"] for bucket in sent) == result["weights"]["bytes"]
    assert result["weights"]["received_by"]["default-prefill-0"] == "0-63" and len(result["weights"]["received_by"]) == 4

    assert main([*own, "--expect-digest", result["weights"]["digest"], *flagship.written(tmp_path)]) == 0
    changed = flagship.with_flag("--update-weight-buffer-size", "1073741824").written(tmp_path)
    assert main([*own, "--expect-digest", result["weights"]["digest"], *changed]) == 1
    assert "the weight map differs from the expected one" in capsys.readouterr().out


def test_violations_end_with_status_1_and_appear_on_the_page(
    flagship: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    page = tmp_path / "r.html"
    argv = (
        flagship.with_flag("--expert-model-parallel-size", "48").with_flag("--custom-rm-path", "<b>grade</b>").written(tmp_path)
    )
    assert main(["--html", str(page), *argv]) == 1
    assert "NOT LAUNCHABLE: 3 violations" in capsys.readouterr().out
    read = Page()
    read.feed(page.read_text())
    assert read.open == [] and "<b>" not in page.read_text() and "EP 48" in page.read_text()


def test_a_measured_run_stands_beside_the_prediction(flagship: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The rows that 256 GPU ranks would write, with made-up bytes: 20.0 GB while training, a little more on rank 255."""
    from slime.ray.train_actor import RankMemory

    memory, page, data = tmp_path / "memory.json", tmp_path / "r.html", tmp_path / "r.json"
    phases = ("load", "hand-over", "log-probs", "train", "weight sync", "checkpoint")  # all that a trainer measures

    def peaks(rank: int) -> dict[str, dict[str, int]]:
        train = 20_000_000_000 + rank // 255
        sizes = (
            {"start": (512, 2 << 20)} | dict.fromkeys(phases, (19_000_000_000, 19_500_000_000)) | {"train": (train, 21 * 10**9)}
        )
        return {phase: {"tensors": tensors, "reserved": reserved} for phase, (tensors, reserved) in sizes.items()}

    ranks = [vars(RankMemory(rank, rank // 32, "cuda", 4096, 2, True, peaks(rank))) for rank in range(256)]
    memory.write_text(json.dumps({"ranks": ranks}))
    own = ["--no-ranks", "--html", str(page), "--json", str(data), "--measured", str(memory), "--engine-version", "0.5.23"]
    argv = flagship.written(tmp_path)
    assert main([*own, *argv]) == 0
    told = json.loads(data.read_text())["memory"]["measured"]
    rows = {(row["stage"], row["phase"]): row for row in told["peaks"]}
    assert set(rows) == {(stage, phase) for stage in range(8) for phase in phases}
    assert rows[7, "train"]["measured"] == 20_000_000_001 and told["micro_batch_tokens"] == 4096
    assert told["allocator_slack"] == 10**9
    # Stage 3: 2.9496 billion parameters in bf16, fp32 gradients but for two indexers of 9,371,904, and what 4096 tokens add.
    awake = 6 * 2_949_632_512 - 4 * 2 * 9_371_904
    # Half of them is what the sparse core stages for 1024 queries of 2048 keys.
    assert rows[3, "hand-over"]["predicted"] == awake
    assert 0 < rows[3, "train"]["predicted"] - awake - 1024 * 2048 * 576 * 2 < 2.5e9
    # Gradients are with the host while weights are sent, in three times a bucket of 2 GiB.
    assert rows[3, "weight sync"]["predicted"] == 2 * 2_949_632_512 + 3 * (2 << 30)
    error = (rows[3, "train"]["predicted"] - 20e9) / 20e9
    assert rows[3, "train"]["error"] == pytest.approx(error, abs=1e-6)
    out = capsys.readouterr().out
    assert "-- prediction and measurement, GB" in out and "predictions are off by up to" in out
    assert "the allocator kept up to 1.000 GB beside them, a part of overhead_gb 6" in out
    assert "predicted and measured memory" in page.read_text() and f"{error:+.1%}" in page.read_text()

    memory.write_text(json.dumps({"ranks": ranks[:8]}))
    assert main([*own, *argv]) == 1
    assert "is of 8 ranks in 1 stages, the flags make 256 in 8" in capsys.readouterr().out
    assert main([*own[:-3], str(tmp_path / "none"), *argv]) == 2, "a file that is not there"


def test_a_report_holds_the_stream_that_a_run_compares_itself_with(
    flagship: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    report, argv = tmp_path / "r.json", flagship.written(tmp_path)
    own = ["--no-ranks", "--engine-version", "0.5.23"]
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert main([*own, "--json", str(report), *argv]) == 0
    digest = json.loads(report.read_text())["weights"]["stream_digest"]
    assert rehearsed_digest(str(report), key="secret") == rehearsed_digest(str(report), key=None) == digest
    with pytest.raises(ValueError, match="is not signed with this SLIME_REHEARSAL_KEY"):
        rehearsed_digest(str(report), key="another")
    assert main([*own, *argv, "--rehearsed", str(report)]) == 0
    # The engines' layout does not change what the trainer sends; the trainer's does.
    smaller = flagship.with_flag("--update-weight-buffer-size", "1073741824").written(tmp_path)
    assert main([*own, *smaller, "--rehearsed", str(report)]) == 1
    assert "the weight stream is not that of --rehearsed" in capsys.readouterr().out
    report.write_text("{}")
    with pytest.raises(ValueError, match="is no complete rehearsal report"):
        rehearsed_digest(str(report), key=None)


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def test_a_browser_shows_the_page(flagship: Recipe, tmp_path: Path) -> None:
    """Headless, with the network off, wide and narrow: every picture has a size, no word is cut, and nothing was asked for."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser here ({', '.join(BROWSERS)}); the page's structure is tested without one")
    page = tmp_path / "r.html"
    assert main(["--no-ranks", "--html", str(page), "--engine-version", "0.5.23", *flagship.written(tmp_path)]) == 0
    probe = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({"
        "pictures: [...document.querySelectorAll('[aria-label]')].map(one => one.getBoundingClientRect().height > 25), "
        "cut: [...document.querySelectorAll('.name, .value, .legend span, td')]"
        ".filter(one => one.scrollWidth > one.offsetWidth + 1).length, "
        "words: [...document.querySelectorAll('svg text')].filter(one => one.getBBox().x < 0 || "
        "one.getBBox().x + one.getBBox().width > one.ownerSVGElement.viewBox.baseVal.width).length, "
        "loads: performance.getEntriesByType('resource').length, "
        "fits: document.documentElement.scrollWidth <= innerWidth}) })</script>"
    )
    page.write_text(page.read_text().replace("</body>", probe + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000"]
    for width in (1280, 800):
        child = subprocess.run(
            [browser, *flags, f"--window-size={width},900", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=300,
        )
        told = json.loads(re.search(r"<title>(\{.*?\})</title>", child.stdout)[1])
        assert told == {"pictures": [True] * 7, "cut": 0, "words": 0, "loads": 0, "fits": True}, (width, child.stderr[-1000:])


def test_own_flags_are_taken_out_and_checked() -> None:
    own, rest = split_own(
        ["--lr", "1", "--json", "a", "--rate=peak_tflops=500", "--rate", "x=1", "--rehearse"], OWN, repeated=("--rate",)
    )
    assert rest == ["--lr", "1"] and own == {"--json": ["a"], "--rate": ["peak_tflops=500", "x=1"], "--rehearse": [""]}
    assert main(["--rate", "speed=3", "--lr", "1e-6"]) == 2, "a rate that does not exist"
    with pytest.raises(ValueError, match="--json wants a value"):
        split_own(["--json"], OWN)
    for wrong in (
        ["--gpu-memory", "lots"],
        ["--gpu-memory", "0"],
        ["--json", "/no/such/folder/r.json"],
        ["--runtime-env", "[1"],
    ):
        assert main([*wrong, "--lr", "1e-6"]) == 2, wrong
    twice, _ = split_own(["--rehearse", "--rehearse"], OWN)
    assert twice == {"--rehearse": ["", ""]}, "a launcher and its user may both say so"


def test_flags_and_layout_need_no_heavy_import(flagship: Recipe, tmp_path: Path) -> None:
    """A child process in which importing torch, numpy, ray or sglang is an error."""
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'ray', 'sglang', 'megatron'): sys.modules[name] = None\n"
        "from slime.rehearse.command import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    env = json.dumps(flagship.env)
    argv = ["--runtime-env", env, "--engine-version", "0.5.15.post1", *flagship.written(tmp_path)]
    child = subprocess.run([sys.executable, "-c", code, "--quick", *argv], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-2000:]
    # The weight map, memory and cost are arithmetic too.
    child = subprocess.run([sys.executable, "-c", code, "--no-ranks", *argv], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 0 and "743.4" not in child.stderr


@pytest.mark.slow
def test_the_launcher_rehearses_from_an_empty_machine(tmp_path: Path) -> None:
    """bash run-glm5.2-744B-A40B.sh --rehearse: nothing is set or there, all 256 ranks are built, nothing is started."""
    import os

    env = {key: value for key, value in os.environ.items() if key not in ("BASE_DIR", "MASTER_ADDR", "HOSTFILE")}
    report = tmp_path / "r.json"
    command = [
        "bash",
        str(ROOT / "scripts" / "run-glm5.2-744B-A40B.sh"),
        "--rehearse",
        "--json",
        str(report),
        "--engine-version",
        "0.5.23",
    ]
    child = subprocess.run(
        command, env={**env, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=540, cwd=tmp_path
    )
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-2000:]
    result = json.loads(report.read_text())
    assert result["ranks"]["built"] == 256 and result["ranks"]["unique_parameters"] == 743_377_000_704
    assert result["ranks"]["peak_bytes"] < 4 << 30
    assert not list(tmp_path.glob("*ray*"))


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--json", "/dev/full"], 2, "--json /dev/full cannot be written (No space left on device)"),
        (["--gpu-memory", "1e300"], 2, "--gpu-memory may be 100,000 at most, got 1e300"),
        (["--rate", "nic_gb_per_s=0"], 2, "give a number from 1e-9 to 1e15"),
        (["--sequence-tokens", "10" * 20], 2, "--sequence-tokens may be 1,000,000,000,000,000 at most"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    flags: list[str], status: int, said: str, flagship: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--quick", *flags, *flagship.written(tmp_path)]) == status
    assert said in capsys.readouterr().err


def test_a_terminal_that_spells_ascii_gets_the_report_and_a_full_one_a_line(flagship: Recipe, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    argv = ["--quick", "--html", str(page), *flagship.with_flag("--prompt-data", "/data/pr\u00fcf.jsonl").written(tmp_path)]
    command = [sys.executable, "-m", "slime.rehearse", *argv]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ascii_only)
    assert child.returncode in (0, 1, 3) and "pr\\udcc3\\udcbcf.jsonl" in child.stdout and child.stderr == ""
    assert "pr\u00fcf.jsonl" in page.read_text(encoding="utf-8"), "the page is UTF-8 wherever it is written"
    with open("/dev/full", "w") as full:
        child = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.returncode == 2 and child.stderr.splitlines()[0].startswith("rehearse: the report cannot be written (No space")
    # A reader that has seen enough: as `| head -1` is.
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    child.stdout.close()
    assert "Traceback" not in child.communicate()[1]
