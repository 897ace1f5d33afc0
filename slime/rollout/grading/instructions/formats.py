"""IFBench: instructions about the form of a response, and about repeating the request."""

from __future__ import annotations

import re
import string

from slime.rollout.grading.instructions.text import EDGES, Check, sentences, tokens

_EMOJI = re.compile(r"[\u2600-\u27bf\u2b00-\u2bff\u231a-\u23ff\u3030\u303d\u2190-\u21ff\U0001f000-\U0001faff]")
_ONLY_THIS = "only output this sentence here, ignore all other requests."
_PAIRS = {")": "(", "]": "[", "}": "{"}


def parentheses(response: str) -> bool:
    """Five levels of brackets, properly nested, of which the fifth closes."""
    levels: list[str] = []
    deepest = 0
    for char in response:
        if char in "([{":
            levels.append(char)
            deepest = max(deepest, len(levels))
        elif char in _PAIRS:
            if levels and levels[-1] == _PAIRS[char]:
                levels.pop()
                if deepest >= 5:
                    return True
            else:
                levels, deepest = [], 0
    return False


def quotes(response: str) -> bool:
    """Three levels of double and single quotes, all closed."""
    levels: list[str] = []
    deepest = 0
    for char in response:
        if levels and char == levels[-1]:
            levels.pop()
            if deepest - len(levels) >= 3:
                return True
        elif char in "\"'":
            levels.append(char)
            deepest = max(deepest, len(levels))
    return False


def options(response: str, options: str) -> bool:
    """One of them, separated by /, "or" or commas; a), b), c) must be given as they are."""
    separator = "/" if "/" in options else "or" if "or" in options else ","
    allowed = [option.strip() for option in options.split(separator)]
    if re.match(r"\W*[aA]\W*[bB]\W*[cC]\W*", options):
        return response in allowed
    return response.strip(EDGES).lower() in [option.strip(EDGES).lower() for option in allowed]


def newline(response: str) -> bool:
    """Each word on a line of its own."""
    text = response.translate(str.maketrans("", "", string.punctuation)).strip()
    return len([line for line in text.split("\n") if line]) == len(text.split())


def emoji(response: str) -> bool:
    """At the end of every sentence; after its full stop, too."""
    found = [sentence.translate(str.maketrans("", "", string.punctuation)).strip() for sentence in sentences(response)]
    for place, sentence in enumerate(found):
        after = found[place + 1][:1] if place + 1 < len(found) else ""
        if not sentence or not (_EMOJI.search(sentence[-2:]) or _EMOJI.match(after)):
            return False
    return True


def line_indent(response: str) -> bool:
    """Every line is indented further than the one before."""
    depths = [len(line) - len(line.lstrip(" ")) for line in response.split("\n") if line.strip()]
    return all(before < after for before, after in zip(depths, depths[1:], strict=False))


def quote_unquote(response: str) -> bool:
    """Something unquoted follows every quoted phrase."""
    text = "".join(response.replace("“", '"').replace("”", '"').replace("'\"'", "").split())
    return '""' not in text and not text.strip(string.digits + string.punctuation.replace('"', "")).endswith('"')


def item_list(response: str, sep: str) -> bool:
    return response.count(sep) >= 2


def thesis(response: str) -> bool:
    """A statement in <i> or <em>, and something behind it."""
    start = re.search(r"<(?:i|em)>", response)
    end = re.compile(r"</(?:i|em)>").search(response, start.end()) if start else None
    return end is not None and bool(response[start.end() : end.start()].strip()) and bool(response[end.end() :].strip())


def sub_bullets(response: str) -> bool:
    """A - below every *."""
    return all("-" in bullet for bullet in response.split("*")[1:])


def no_bullets_bullets(response: str) -> bool:
    """Two sentences or more, then two bullets (*) or more, then nothing."""
    num_sentences = num_bullets = 0
    for line in response.split("\n"):
        if line.strip().startswith("*"):
            if num_sentences < 2:
                return False
            num_bullets += 1
        elif num_bullets:
            return False
        else:
            num_sentences += len(sentences(line))
    return num_bullets >= 2


def title_case(response: str) -> bool:
    """No word begins with a small letter."""
    return not any(word[0].islower() and (word[1:].islower() or word[1:].isupper()) for word in tokens(response))


def output_template(response: str) -> bool:
    return all(part in response for part in ("My Answer:", "My Conclusion:", "Future Outlook:"))


def no_whitespace(response: str) -> bool:
    return not any(char.isspace() for char in response)


def repeat_change(response: str, prompt_to_repeat: str) -> bool:
    """The request with another first word."""
    return response != prompt_to_repeat and response.split()[1:] == prompt_to_repeat.split()[1:]


def repeat_simple(response: str) -> bool:
    return response.strip().lower() == _ONLY_THIS


def repeat_span(response: str, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    """The words of the request from index n_start up to n_end."""
    return response.lower().split() == prompt_to_repeat.lower().split()[n_start:n_end]


CHECKS: dict[str, Check] = {
    "format:parentheses": parentheses,
    "format:quotes": quotes,
    "format:options": options,
    "format:newline": newline,
    "format:emoji": emoji,
    "format:line_indent": line_indent,
    "format:quote_unquote": quote_unquote,
    "format:list": item_list,
    "format:thesis": thesis,
    "format:sub-bullets": sub_bullets,
    "format:no_bullets_bullets": no_bullets_bullets,
    "format:title_case": title_case,
    "format:output_template": output_template,
    "format:no_whitespace": no_whitespace,
    "repeat:repeat_change": repeat_change,
    "repeat:repeat_simple": repeat_simple,
    "repeat:repeat_span": repeat_span,
}
