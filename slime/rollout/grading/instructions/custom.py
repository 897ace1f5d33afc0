"""IFBench: whole tasks with one right form."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from datetime import date
from typing import Any

from slime.rollout.grading.instructions.text import EDGES, Check, bare_words, sentences

# Capitals of Europe north of 45 degrees, from the north to the south.
_CAPITALS = (
    "Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin Amsterdam Warsaw London "
    "Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz Chisinau Bern Ljubljana Zagreb"
).split()
_NAPOLEON = range(1769, 1822)


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def multiples(response: str) -> bool:
    """The multiples of 7 from 10 to 50, and no other number."""
    return re.findall(r"\d+", response) == [str(number) for number in range(14, 51, 7)]


def mcq_count_length(response: str) -> bool:
    """Four questions of five options, each longer than the one before, and nothing ahead of them."""
    if not response.startswith("Question"):
        return False
    questions = [part.strip() for part in re.split(r"Question \d+[.|):;]?", response) if part.strip()]
    lengths = []
    for question in questions:
        lines = [line.strip() for line in question.split("\n")]
        is_option = [bool(re.match(r"[A-Ea-e][.|)]\s*\w", line)) for line in lines]
        if sum(is_option) != 5:
            return False
        lengths.append(len(" ".join(lines[: is_option.index(True)])))
    return len(lengths) == 4 and all(before < after for before, after in zip(lengths, lengths[1:], strict=False))


def reverse_newline(response: str) -> bool:
    """52 countries or more, a line each, from Zimbabwe back."""
    lines = [_ascii(line.strip(EDGES)) for line in response.split("\n") if line.strip(EDGES)]
    first = next((place for place, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
    return len(lines) - first >= 52 and lines[first:] == sorted(lines[first:], reverse=True)


def word_reverse(response: str) -> bool:
    """One sentence about the bald eagle, word by word from its end."""
    forward = " ".join(bare_words(response.lower())[::-1])
    return "bald eagle" in forward and sentences(forward) == [forward]


def character_reverse(response: str) -> bool:
    return "elgae dlab" in response.lower()


def sentence_alphabet(response: str) -> bool:
    """26 sentences from A to Z."""
    found = sentences(response)
    return len(found) == 26 and all(sentence[0].lower() == chr(97 + place) for place, sentence in enumerate(found))


def european_capitals_sort(response: str) -> bool:
    return [part.strip() for part in _ascii(response).split(",") if part.strip()] == _CAPITALS


def _rows(text: str, **form: Any) -> list[list[str]]:
    """None at all of a text that is no CSV."""
    try:
        return list(csv.reader(io.StringIO(text), **form))
    except csv.Error:
        return []


def _has_form(response: str, header: list[str], *, num_rows: int, delimiter: str = ",") -> bool:
    """The header, quoted or not, and so many rows below it."""
    rows = _rows(response.strip(), delimiter=delimiter, quoting=csv.QUOTE_NONE, skipinitialspace=True)
    return len(rows) == num_rows + 1 and [field.strip().strip('"') for field in rows[0]] == header


def csv_city(response: str) -> bool:
    rows = _rows(response)
    header = ["ID", "Country", "City", "Year", "Count"]
    return len(rows) == 8 and rows[0] == header and all(len(row) == 5 for row in rows)


def csv_special_character(response: str) -> bool:
    """One quoted field with something that is no letter, digit or space."""
    if not _has_form(response, ["ProductID", "Category", "Brand", "Price", "Stock"], num_rows=14):
        return False
    if any(len(row) != 5 for row in _rows(response.strip(), skipinitialspace=True)):
        return False
    quoted = response.partition("\n")[2].split('"')[1::2]
    return any(re.search(r"[^\w\s]", field) for field in quoted)


def csv_quotes(response: str) -> bool:
    """Tabs between fields, quotes around each, those of the header included."""
    if not _has_form(response, ["StudentID", "Subject", "Grade", "Semester", "Score"], num_rows=3, delimiter="\t"):
        return False
    fields = [[field.strip() for field in line.split("\t")] for line in response.strip().split("\n")]
    return all(len(row) == 5 and all(len(f) > 1 and f[0] == f[-1] == '"' for f in row) for row in fields)


def date_format_list(response: str) -> bool:
    """Dates of Napoleon's life as YYYY-MM-DD, separated by commas."""
    for part in response.strip().split(","):
        found = re.fullmatch(r"(\d{4})-(\d{2})-(\d{2})", part.strip())
        if found is None or int(found[1]) not in _NAPOLEON:
            return False
        try:
            date(*map(int, found.groups()))
        except ValueError:
            return False
    return True


CHECKS: dict[str, Check] = {
    "custom:multiples": multiples,
    "custom:mcq_count_length": mcq_count_length,
    "custom:reverse_newline": reverse_newline,
    "custom:word_reverse": word_reverse,
    "custom:character_reverse": character_reverse,
    "custom:sentence_alphabet": sentence_alphabet,
    "custom:european_capitals_sort": european_capitals_sort,
    "custom:csv_city": csv_city,
    "custom:csv_special_character": csv_special_character,
    "custom:csv_quotes": csv_quotes,
    "custom:date_format_list": date_format_list,
}
