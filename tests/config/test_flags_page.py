"""docs/en/advanced/flags.md is the declarations' own words."""

from __future__ import annotations

from slime.config.command_line import flag_table
from slime.config.flags_page import ACTS_IN, OWN, PAGE, page
from slime.config.megatron_words import MEANING


def test_the_page_of_flags_is_current() -> None:
    assert PAGE.read_text() == page(), "python3 -m slime.config.flags_page --write"


def test_every_flag_of_the_page_says_what_it_takes_and_what_it_means() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `--")]
    assert len(rows) > 500
    assert [row[0] for row in rows if not row[-1].removesuffix("|").strip()] == []
    # What is said of megatron-core's fields is said of fields that some flag fills.
    assert {row.dest for row in flag_table().values()} >= set(MEANING)


def test_every_flag_of_a_section_stands_on_it_once_with_its_range() -> None:
    lines = PAGE.read_text().splitlines()
    for row in flag_table().values():
        if "." not in row.section:
            assert sum(line.startswith(f"| `{row.name}` |") for line in lines) == 1, row.name
    assert "| `--lr` | number, above 0 and at most 1 | `1e-06` | Peak learning rate. |" in lines
    assert "| `--rollout-top-k` | whole number, -1 or at least 1 | `-1` | Top-k sampling; -1 is off. |" in lines
    assert {row.dest for row in flag_table().values()} >= OWN and set(ACTS_IN) == {
        row.section for row in flag_table().values() if "." not in row.section
    }
