"""The door itself: exit status, files, the page, speed, and that a laptop without torch is enough."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slime.rehearse.command import main, split_own
from tests.rehearse.recipes import ROOT, Recipe

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Checks nesting and collects what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.counts: dict[str, int] = {}
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [
            f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")
        ]
        self.titles += [value for name, value in attrs if name == "aria-label"]
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
        "rank grid by stage and memory",
        "stage balance",
        "iteration timeline",
        "weight flow",
        "memory by phase and stage",
    ]
    assert page.read_text().count("<title>rank ") == 256 + 1, "a hint per rank, and the title of the grid"
    result = json.loads(data.read_text())
    assert (
        result["launchable"]
        and result["grid"]["dp"] == 1
        and result["stages"]["best"]["layers"]
        and result["weights"]["tensors"] == 58_794
    )
    lines = table.read_text().splitlines()
    assert len(lines) == 58_794 and lines[0].startswith("model.embed_tokens.weight\t154880x6144\t-\t0\tvocab 1/4 x8\t0\t0")

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


def test_own_flags_are_taken_out_and_checked() -> None:
    own, rest = split_own(["--lr", "1", "--json", "a", "--rate=peak_tflops=500", "--rate", "x=1", "--rehearse"])
    assert rest == ["--lr", "1"] and own == {"--json": ["a"], "--rate": ["peak_tflops=500", "x=1"], "--rehearse": [""]}
    assert main(["--rate", "speed=3", "--lr", "1e-6"]) == 2, "a rate that does not exist"
    with pytest.raises(ValueError, match="--json wants a value"):
        split_own(["--json"])


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
    """bash run-glm5.2-744B-A40B.sh --rehearse: nothing is set, nothing is there, all 256 ranks are built, nothing is started."""
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
