"""The page in numbers: what stands first, what stages are called, what the bars say, and that every colour has its word."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from slime.rehearse.options import Options
from slime.rehearse.report.bars import layers_text
from slime.rehearse.report.page import as_html
from slime.rehearse.result import Rehearsal, rehearse
from tests.rehearse.edits import all_of, flags, without
from tests.rehearse.recipes import Recipe, one_node

VIRTUAL = all_of(
    without("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
    flags("--pipeline-model-parallel-layout", "6,4,4,4,4,4,8,8,8,4,4,4,4,4,4,4"),
)


def rehearsed(recipe: Recipe, folder: Path, **options: object) -> Rehearsal:
    told = Options(build_ranks=False, env=recipe.env, engine_version="0.5.23", **options)
    return rehearse(recipe.written(folder), told)


def values_of(page: str, figure: str) -> list[tuple[str, str]]:
    """(name, value) of each bar of a picture."""
    begin = page.index(f'aria-label="{figure}"')
    end = page.find("<h2>", begin)
    return re.findall(r'<span class="name">(.*?)</span>.*?<span class="value[ a-z]*">(.*?)</span>', page[begin:end])


def test_virtual_stages_are_named_by_the_layers_of_all_their_chunks(flagship: Recipe, tmp_path: Path) -> None:
    """By hand: the list has 16 chunks, of which rank 0 has the first and the ninth, 6 + 8 layers."""
    page = as_html(rehearsed(VIRTUAL(flagship), tmp_path)).replace("\u2011", "-")
    names = [name for name, _ in values_of(page, "ranks by stage and memory")]
    assert names[0] == "stage 0: layers 1-6, 43-50" and names[7] == "stage 7: layers 35-42, 75-78"
    balance = values_of(page, "stage balance")
    assert [name for name, _ in balance] == [f"stage {stage}" for stage in range(8)] * 3, "as given, best pair, best list"
    assert balance[0][1].startswith("14 layers, ") and balance[-8][1].startswith("6 + 8 layers, ")
    # The given list is the best one, so its stages cost the same in both.
    assert [value.split(", ")[1] for _, value in balance[:8]] == [value.split(", ")[1] for _, value in balance[-8:]]


def test_costs_of_a_pair_under_virtual_stages_are_those_of_all_chunks(flagship: Recipe, tmp_path: Path) -> None:
    """Chunks interleave: with half of a stage's layers in each, costs still add up to the model's."""
    done = rehearsed(flags("--num-virtual-stages-per-pipeline-rank", "2")(flagship), tmp_path, quick=True)
    whole = sum(done.balance.costs)
    for split in (*done.balance.first_last, done.balance.best):
        assert sum(split.costs) == pytest.approx(whole) and len(split.costs) == 8
        assert sum(map(sum, split.stage_layers)) == 78


def test_layers_are_listed_as_flags_count_them() -> None:
    assert layers_text((0, 1, 2, 10)).replace("\u2011", "-") == "layers 1-3, 11" and layers_text((4,)) == "layer 5"


def test_main_memory_is_drawn_against_the_node(flagship: Recipe, tmp_path: Path) -> None:
    """741 GB while engines generate: 479 of optimizer, 160 of gradients, 98 of sleeping weights, 4 of drafts."""
    done = rehearsed(flagship, tmp_path)
    bars = dict(values_of(as_html(done), "main memory of a node"))
    assert bars == {"engines generate": "741 of 2,000 GB", "checkpoint, at most": "1,202 of 2,000 GB"}
    small = as_html(rehearsed(flagship, tmp_path, host_memory_gb=700.0))
    assert dict(values_of(small, "main memory of a node"))["engines generate"] == "741 of 700 GB"
    assert small.count('class="value over"') == 2 and "main memory, it has 700 (--host-memory)" in small
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", small[small.index('aria-label="main memory') :])[:4]]
    # Of the checkpoint's 1,202 GB, which is the whole width: weights, gradients, optimizer, drafts of the first bar.
    assert widths == pytest.approx([100 * part / 1202 for part in (98.2, 159.7, 479.1, 4.1)], abs=0.05)


def test_verdict_and_open_points_come_before_every_picture(flagship: Recipe, tmp_path: Path) -> None:
    broken = as_html(rehearsed(flagship.with_flag("--expert-model-parallel-size", "48"), tmp_path))
    order = [broken.index(words) for words in ("<strong>NOT LAUNCHABLE<", "Violations (", "Not checked from here (")]
    assert order == sorted(order) and order[2] < broken.index('role="figure"') and '<p class="verdict bad">' in broken
    argv = one_node("qwen3-8B", "nobody-knows", tp="2", ep="1")
    open_points = as_html(rehearse(argv, Options(build_ranks=False, engine_version="0.5.23")))
    assert '<p class="verdict open"><strong>NOT PROVEN</strong>' in open_points
    assert open_points.index('<td class="unproven">') < open_points.index('<td class="unchecked">')
    assert open_points.index('<td class="unchecked">') < open_points.index('role="figure"') < open_points.index("<h2>Checked (")


def test_every_colour_of_a_picture_is_in_its_legend(flagship: Recipe, tmp_path: Path) -> None:
    page = as_html(rehearsed(flagship, tmp_path))
    for figure in ("stage balance", "memory by phase and stage", "main memory of a node"):
        begin = page.index(f'aria-label="{figure}"')
        part = page[begin : page.find("<h2>", begin)]
        named = set(re.findall(r'class="swatch (\w+)"', part))
        assert set(re.findall(r'<i class="(\w+)" style="width', part)) == named - {"limit"}, figure
    assert len(set(re.findall(r'<i class="(k\d)"', page))) <= 8, "colours of the whole page"


def test_more_ranks_than_can_be_told_apart_are_not_drawn_one_by_one(flagship: Recipe, tmp_path: Path) -> None:
    done = rehearsed(flagship, tmp_path)
    many = replace(done.reading, grid=replace(done.reading.grid, world=256 * 64))
    page = as_html(replace(done, reading=many))
    assert 'title="rank ' not in page and len(values_of(page, "ranks by stage and memory")) == 8
