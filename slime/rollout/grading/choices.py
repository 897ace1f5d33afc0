"""Multiple choice (`gpqa`): the letter that a response settles on, against a letter, an index or the text of a choice."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slime.rollout.grading.response import answer_part, last_boxed, without_end_tokens

_DEFAULT_LETTERS = tuple("ABCDEFGHIJ")

# Between the word and the letter: "is", a colon, brackets, stars. Bounded, so that no text makes the search quadratic.
_OPEN = r"[\s:=,*_`\"'(\[{$\\>-]{0,12}"
_CLOSE = r"[)\]}*_`\"'$.,;:!]{0,6}"
_BE = r"(?:is|are|was|would\s+be|should\s+be|must\s+be|has\s+to\s+be|will\s+be|being|to\s+be)"
_LINK = rf"(?:\s{{1,4}}(?:{_BE}|是|ist|es|est)(?:\s(?:clearly|thus|indeed|therefore|simply|definitely))?)?"
# "The answer to question A is C" and "the option that fits is C": what stands between must lead to a verb or a colon.
_OF_WHAT = rf"(?:\s+(?:to|that|which|for|of)\s+[^\n.:]{{1,60}}?(?=\s+{_BE}\s|\s?:))?"
_NOT_BUT = r"(?:(?:n't|\s+not)\s+[^\n.;]{1,40}?\s+but(?:\s+rather)?)?"
_KIND = r"(?:[\s:*_]{1,6}(?:the\s+)?(?:correct|right|best|final)?\s?(?:answer|option|choice|letter|statement))?"
_DRESSED = r"(?:\\(?:text|mathrm|mathbf|textbf)\{)?[(*]{0,3}"
_VERBS = (
    r"choose|choosing|chose|select|selecting|pick|picking|go\s+with|going\s+with|opt\s+for|it\s+is|it's|it\s+must\s+be|"
    r"is\s+therefore|therefore|thus|hence|so"
)
_ANSWER = (
    r"(?:\b(?:answer|option|choice|conclusion|solution)s?|\bcorrect|\bantwort|\brespuesta|\bréponse"
    r"|答案[是为]?|回答[是为]?|选择?)"
)
_STATED = (
    rf"{_ANSWER}{_OF_WHAT}{_LINK}{_NOT_BUT}{_KIND}{_LINK}{_OPEN}{_DRESSED}",
    rf"\b(?:{_VERBS}){_KIND}{_OPEN}",
)
_CONFIRMED = (
    rf"{_CLOSE}\s{{1,4}}(?:{_BE}|seems|looks)\s{{1,4}}(?:therefore\s+|thus\s+|clearly\s+|also\s+)?(?:(?:the|my)\s+)?"
    r"(?:final\s+)?(?:correct|right|best|true|answer)"
)
_TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textrm|textit|textsf|mathrm|mathbf|mathit|mathsf|operatorname|mbox|boldsymbol)\s*(?=\{)"
    r"|\\(?:bf|rm|it)(?![A-Za-z])"
)


_QUOTES = str.maketrans("“”„‘’", '"""\'\'')


@dataclass(frozen=True)
class Choices:
    letters: tuple[str, ...]
    texts: Mapping[str, str]
    """letter -> plain text of the choice, where they are known."""

    @property
    def one(self) -> str:
        """A pattern for one letter."""
        return "(?P<letter>" + "|".join(re.escape(letter) for letter in self.letters) + ")"


def _plain(text: str) -> str:
    """Lower case, without LaTeX dressing and punctuation, one space between words."""
    text = _TEXT_COMMAND.sub("", _in_ascii(text))
    return re.sub(r"[\s\\$*_{}()\[\]\"'`,;:!?]+|\.(?!\d)", " ", text).strip().lower()


def _in_ascii(text: str) -> str:
    """Letters of other widths and faces (Ｂ, 𝐁) and typographic quotes as those of a keyboard."""
    return unicodedata.normalize("NFKC", text).translate(_QUOTES)


def read_choices(metadata: Mapping[str, Any]) -> Choices:
    choices = metadata.get("choices")
    choices = choices if isinstance(choices, Mapping) else list(choices) if choices is not None else []
    given = metadata.get("valid_letters")
    if given is not None and len(given):
        letters = tuple(str(letter).strip().upper() for letter in given)
    elif isinstance(choices, Mapping) and choices:
        letters = tuple(str(letter).strip().upper() for letter in choices)
    else:
        letters = tuple(chr(ord("A") + place) for place in range(len(choices))) or _DEFAULT_LETTERS
    pairs = choices.items() if isinstance(choices, Mapping) else zip(letters, choices, strict=False)
    return Choices(letters, {str(letter).strip().upper(): _plain(_without_letter(str(text), letter)) for letter, text in pairs})


def _without_letter(text: str, letter: object) -> str:
    """`(B) Paris` or `B. Paris` as the text of choice B."""
    return re.sub(rf"^\s*[(\[]?{re.escape(str(letter))}[)\].:]\s+", "", text)


def right_letter(label: Any, metadata: Mapping[str, Any]) -> str:
    """The letter of the right choice. Raises ValueError when neither label nor metadata say it."""
    choices = read_choices(metadata)
    for value in (metadata.get("correct_letter"), label, metadata.get("correct_answer"), metadata.get("answer_text")):
        letter = _letter_of_label(value, choices)
        if letter is not None:
            return letter
    raise ValueError(
        f"which choice is right? label {label!r} is none of {', '.join(choices.letters)}, no index and no text of a choice"
    )


def _letter_of_label(value: Any, choices: Choices) -> str | None:
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return choices.letters[int(value)] if value == int(value) and 0 <= value < len(choices.letters) else None
    text = str(value).strip()
    letter = _named(last_boxed(text) or text, choices)
    if letter is not None:
        return letter
    return choices.letters[int(text)] if text.isdigit() and int(text) < len(choices.letters) else None


def _named(text: str, choices: Choices) -> str | None:
    """The letter that a short text is: `B`, `(b)`, `\\textbf{(B)}`, `B. Paris`, `Option B`, or the text of a choice."""
    bare = _TEXT_COMMAND.sub("", text).strip(" \t\n$\\{}()[]*_`.\"':;,!#>-")
    if bare.upper() in choices.letters:
        return bare.upper()
    plain = _plain(text)
    same = [letter for letter, choice in choices.texts.items() if choice and choice == plain]
    if same:
        return same[0] if len(same) == 1 else None
    dressed = _TEXT_COMMAND.sub("", text).strip(" \t\n$\\{*_`\"'#>-")
    found = re.match(
        rf"(?:(?i:the\s+)?(?i:answer|option|choice)(?i:\s+is)?[\s:]{{0,4}})?[(\[{{*]{{0,3}}{choices.one}(?P<rest>.*)",
        dressed,
        re.DOTALL,
    )
    if found is None:
        return None
    letter, rest = found["letter"], found["rest"]
    if re.fullmatch(r"[)\]}*_`.:$\\\s]*", rest) or re.match(r"\s*[)\]}.:\-–—][)\]}*\s]*\s|[)\]}.:]", rest):
        return letter
    choice = choices.texts.get(letter)
    return letter if choice and _plain(rest) == choice else None


def chosen_letter(response: str, metadata: Mapping[str, Any]) -> str | None:
    """What the response names as its answer: the last box, else the last statement, else its only letter or choice. None if it
    names none, or an open box stands at its end."""
    choices = read_choices(metadata)
    response = _in_ascii(answer_part(without_end_tokens(response))).strip()
    if "\\boxed" in response or "\\fbox" in response:
        content = last_boxed(response)
        letter = _named(content, choices) if content is not None else None
        if letter is not None or content is None:
            return letter
    return _stated(response, choices) or _alone(response, choices)


def _stated(response: str, choices: Choices) -> str | None:
    """The letter of the last "the answer is B", "I choose (B)", "option B is correct"."""
    found: list[tuple[int, str]] = []
    lower = "".join(letter.lower() for letter in choices.letters if len(letter) == 1)
    for pattern in _STATED:
        for match in re.finditer(rf"(?i:{pattern}){choices.one}(?!['-]?\w)", response):
            found.append((match.start("letter"), match["letter"]))
    if lower:  # "answer: b" at the end of a line or in brackets; "the answer is a number" names nothing
        end = r"(?=[)\]}*_`\"'$.,;:!]{0,6}(?:\s*$|\s*\n)|[)\]}])"
        for match in re.finditer(rf"(?i:{_STATED[0]})(?P<letter>[{re.escape(lower)}])(?!'?\w){end}", response):
            found.append((match.start("letter"), match["letter"].upper()))
    for match in re.finditer(rf"(?<!\w)(?<!\w['-]){choices.one}(?i:{_CONFIRMED})", response):
        found.append((match.start("letter"), match["letter"]))
    for match in re.finditer(rf"(?i:{_STATED[0]})(?P<rest>[^\n]{{1,200}})", response):
        if (letter := _begins_with(match["rest"], choices)) is not None:
            found.append((match.start("rest"), letter))
    return max(found)[1].upper() if found else None


def _begins_with(text: str, choices: Choices) -> str | None:
    """The letter of the longest choice whose text this one begins with: `Paris, not Rome`."""
    plain = f"{_plain(text)} "
    said = [letter for letter, choice in choices.texts.items() if choice and plain.startswith(f"{choice} ")]
    return max(said, key=lambda letter: len(choices.texts[letter]), default=None)


def _alone(response: str, choices: Choices) -> str | None:
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    if not lines:
        return None
    for line in (lines[-1], lines[0]):
        letter = _named(line, choices)
        if letter is not None:
            return letter
    plain = f" {_plain(response)} "
    said = [letter for letter, choice in choices.texts.items() if choice and f" {choice} " in plain]
    return said[0] if len(said) == 1 else None


def grade_gpqa(response: str, label: Any, metadata: Mapping[str, Any]) -> float:
    return float(chosen_letter(response, metadata) == right_letter(label, metadata))


__all__: Sequence[str] = ("chosen_letter", "grade_gpqa", "right_letter")
