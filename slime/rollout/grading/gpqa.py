"""Multiple choice: the letter that the response settles on, against a letter, an index or the text of the right choice."""

from __future__ import annotations

import re
from typing import Any

from slime.rollout.grading.math_grader import last_boxed

_DEFAULT_LETTERS = ("A", "B", "C", "D")
_ANSWER_IS = r"(?i:answer|option|choice)\s*(?i:is|:|=)*\s*[*_(\[{{$]*\s*(?P<letter>[{letters}])\b"


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()


def _letters(metadata: dict[str, Any]) -> tuple[str, ...]:
    given = metadata.get("valid_letters")
    if given:
        return tuple(str(letter).upper() for letter in given)
    choices = metadata.get("choices")
    return tuple(chr(ord("A") + i) for i in range(len(choices))) if choices else _DEFAULT_LETTERS


def _choices(metadata: dict[str, Any], letters: tuple[str, ...]) -> dict[str, str]:
    choices = metadata.get("choices") or {}
    pairs = choices.items() if isinstance(choices, dict) else zip(letters, choices, strict=False)
    return {str(letter).upper(): _plain(str(text)) for letter, text in pairs}


def right_letter(label: Any, metadata: dict[str, Any]) -> str:
    """The letter of the right choice. Raises ValueError when neither label nor metadata say it."""
    letters = _letters(metadata)
    choices = _choices(metadata, letters)
    for value in (metadata.get("correct_letter"), label, metadata.get("correct_answer"), metadata.get("answer_text")):
        if value is None:
            continue
        if isinstance(value, int) and 0 <= value < len(letters):
            return letters[value]
        text = str(value).strip()
        if text.upper().strip("().") in letters:
            return text.upper().strip("().")
        if text.isdigit() and int(text) < len(letters):
            return letters[int(text)]
        for letter, choice in choices.items():
            if choice and choice == _plain(text):
                return letter
    raise ValueError(
        f"which choice is right? label {label!r} is none of {', '.join(letters)}, no index and no text of a choice"
    )


def chosen_letter(response: str, metadata: dict[str, Any]) -> str | None:
    """The last letter that the response names as its answer, boxed first, then "answer is X", then a lone letter at the end."""
    letters = _letters(metadata)
    response = response.split("</think>")[-1]
    boxed = last_boxed(response)
    if boxed is not None:
        plain = re.sub(r"\\text\{(.*)\}", r"\1", boxed).strip("(). ").upper()
        if plain in letters:
            return plain
        return next(
            (letter for letter, choice in _choices(metadata, letters).items() if choice and choice == _plain(boxed)), None
        )
    found = re.findall(_ANSWER_IS.format(letters="".join(letters)), response)
    if found:
        return found[-1].upper()
    last_line = response.strip().splitlines()[-1].strip("().* ") if response.strip() else ""
    if last_line.upper() in letters:
        return last_line.upper()
    plain = _plain(response)
    said = [letter for letter, choice in _choices(metadata, letters).items() if choice and choice in plain]
    return said[0] if len(said) == 1 else None


def grade_gpqa(response: str, label: Any, metadata: dict[str, Any]) -> float:
    return float(chosen_letter(response, metadata) == right_letter(label, metadata))
