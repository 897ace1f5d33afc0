"""Every page is in the index, every link leads somewhere, every file that a page names is there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "slime").rglob("*.md"),
        *(ROOT / "slime_plugins").rglob("*.md"),
    ]
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OURS = ("scripts", "tools", "tests", "slime", "slime_plugins", "docs")
FILE = re.compile(rf"(?<![\w/.{{}}$-])(?:{'|'.join(OURS)})(?:/[\w.*-]+)+")
MODULE = re.compile(r"-m (slime(?:_plugins)?(?:\.\w+)*|tools(?:\.\w+)+)")


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(file relative to the page or "", anchor or "") of every link that stays in the project."""
    for target in LINK.findall(without_blocks(page.read_text())):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            yield file, anchor


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to headings."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.+?) *$", without_blocks(page.read_text()), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = found.get(name, 0)
        found[name] = number + 1
        names.add(f"{name}-{number}" if number else name)
    return names


def wrong_links(page: Path) -> list[str]:
    wrong = []
    for file, anchor in links(page):
        target = (page.parent / file).resolve() if file else page
        if not target.exists():
            wrong.append(f"{file}: no such file")
        elif anchor and anchor not in anchors(target):
            wrong.append(f"{file}#{anchor}: no such heading")
    return wrong


def missing_files(text: str) -> list[str]:
    """Files and modules of the project that code in a page names and that are not there."""
    code = "\n".join(re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))
    code += "\n" + "\n".join(re.findall(r"`([^`\n]+)`", without_blocks(text)))
    named = {name.rstrip(".") for name in FILE.findall(code)}
    absent = [name for name in named if not any(ROOT.glob(name))]
    for module in MODULE.findall(code):
        path = ROOT / module.replace(".", "/")
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
            absent.append(f"-m {module}")
    return sorted(absent)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path):
    assert wrong_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_is_there(page: Path):
    assert missing_files(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_can_be_pasted(page: Path):
    """Bash reads it: no <placeholder> that would open a file, no quote left open."""
    for commands in re.findall(r"^```bash\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        read = subprocess.run(["bash", "-n"], input=commands, capture_output=True, text=True)
        assert (read.returncode, read.stderr) == (0, ""), commands


def test_the_index_has_every_page_with_a_line():
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / file).resolve() for file, _ in links(index)}
    assert sorted(page.name for page in (ROOT / "docs" / "en").rglob("*.md") if page not in listed) == []
    assert all(re.search(r"\): .{20,}\.$|and \[", line) for line in index.read_text().splitlines() if line.startswith("* "))
    assert (ROOT / "docs" / "README.md").resolve() in {(ROOT / file).resolve() for file, _ in links(ROOT / "README.md")}


def test_the_reader_sees_what_is_wrong(tmp_path: Path):
    page = tmp_path / "a.md"
    page.write_text(
        "# A `b`: c\n\n[x](a.md#a-b-c) [y](#nowhere) [z](gone.md) [w](https://x.org)\n```\n[q](no.md)\n# no\n```\n## A b: c\n"
    )
    assert anchors(page) == {"a-b-c", "a-b-c-1"}
    assert wrong_links(page) == ["#nowhere: no such heading", "gone.md: no such file"]
    told = (
        "```bash\nbash scripts/gone.sh x\npython -m slime.gone\npython3 -m slime.rehearse\n```\n"
        "`tools/*.py` `/data/docs/x` `slime/train.py`"
    )
    assert missing_files(told) == ["-m slime.gone", "scripts/gone.sh"]


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs" / "en" / "examples").glob("*/README.md")), ids=lambda page: page.parent.name
)
def test_every_example_shows_what_a_run_of_it_gave(page):
    text = page.read_text()
    assert not re.search(r"\bCURVE\b|[Nn]o curve yet", text)
    assert re.search(r"\| -?\d+\.\d+ \|", text.partition("## Seen on a CPU")[2])
