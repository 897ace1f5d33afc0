"""The page on parallelism says what the tests do."""

from __future__ import annotations

import re

from model.tested_layouts import BEGIN, END, PAGE, page_with_table

from slime.config.command_line import flag_table


def test_the_table_of_tested_flags_is_that_of_the_tests() -> None:
    page = PAGE.read_text()
    assert page.count(BEGIN) == page.count(END) == 1
    assert page == page_with_table(page), "run: python tests/model/tested_layouts.py --write"


def test_every_flag_of_the_table_exists() -> None:
    told = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    found = set(re.findall(r"--[a-z][a-z0-9-]+", told))
    assert len(found) > 12 and found <= set(flag_table()), sorted(found - set(flag_table()))
