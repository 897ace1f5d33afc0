"""The report in words: what the documents show of it is what it says, and its sums are those of numbers made elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slime.rehearse.report.text import as_json, as_text
from slime.rehearse.result import Options, Rehearsal, rehearse
from tests.rehearse.edits import in_group
from tests.rehearse.recipes import ROOT, Recipe

PAGE = (ROOT / "docs/en/advanced/rehearsal.md").read_text()


@pytest.fixture(scope="module")
def flagship_done(flagship: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    folder = tmp_path_factory.mktemp("report")
    return rehearse(flagship.written(folder), Options(env=flagship.env, build_ranks=False))


def shown_below(heading: str) -> list[str]:
    """Lines of the first block of text below a heading of the page, as far as they are whole."""
    [block] = re.findall(r"\n```\n(.*?)\n```\n", PAGE[PAGE.index(f"\n## {heading}\n") :], re.S)[:1]
    return [line for line in block.splitlines() if not line.endswith("...")]


@pytest.mark.parametrize(("heading", "lines"), [("How long it takes", 3), ("What a GPU-hour buys", 14)])
def test_what_the_page_shows_is_what_the_report_says(heading: str, lines: int, flagship_done: Rehearsal) -> None:
    shown, said = shown_below(heading), as_text(flagship_done).splitlines()
    assert len(shown) == lines and not [line for line in shown if line not in said]


def test_sums_of_the_report_are_those_of_the_checkpoint(flagship_done: Rehearsal) -> None:
    """By hand: 75 layers of 256 experts of 3 x 2048 x 6144 FP8 codes, a float32 scale for each 128 x 128 of them."""
    text = as_text(flagship_done)
    codes = 75 * 256 * 3 * 2048 * 6144
    experts = codes + 4 * codes // 128**2
    assert f"bytes of a weight sync: experts {experts / 1e9:.2f} GB, the rest 20.63 GB; land on a GPU 31.96 GB" in text
    assert "in an engine 2.05 TB, in all engines 8.18 TB" in text, "64 and 256 times 31.96 GB"
    told = as_json(flagship_done)["cost"]
    assert "log-probs" not in {phase["name"] for phase in told["phases"]}, "one step a rollout sees the weights that wrote it"
    assert sum(phase["seconds"] for phase in told["phases"]) == pytest.approx(1219.3, abs=0.05)
    assert "  sum                      1219.3 s   86.7 GPU-hours per rollout; rollout dominates" in text
    assert 1219.3 * 256 / 3600 == pytest.approx(86.7, abs=0.05), "seconds of 256 GPUs"
    assert "2,162,688 tokens, " in text and 2_162_688 == 64 * (65_536 // 2 + 1_024), "half of a response, and a prompt"


def test_what_decides_stands_before_what_does_not(flagship: Recipe, tmp_path: Path) -> None:
    """26 requests of 5 draft tokens on a rank are 130, above DeepEP's 128; whether the job says more is not known here."""
    recipe = in_group("decode", ("requests: 768", "requests: 1664"))(flagship)
    done = rehearse(recipe.written(tmp_path), Options(env=None, quick=True, build_ranks=False))
    found = [finding.decides for finding in done.findings.of("unchecked")]
    lines = [line for line in as_text(done).splitlines() if line.startswith(("UNPROVEN ", "unchecked "))]
    assert found[0] is False and any(found), "it was found after others"
    assert "must be at least 130" in lines[0] and [line.startswith("UNPROVEN ") for line in lines] == sorted(
        found, reverse=True
    )
