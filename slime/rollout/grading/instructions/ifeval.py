"""The 25 instructions of IFEval."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from slime.rollout.grading.instructions.text import Check, holds, sentences, tokens
from slime.rollout.grading.instructions.text import num_words as count_words

_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FENCES = ("```json", "```Json", "```JSON", "```")


def existence(response: str, keywords: Sequence[str]) -> bool:
    return all(re.search(re.escape(word), response, re.IGNORECASE) for word in keywords)


def frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    return holds(len(re.findall(re.escape(keyword), response, re.IGNORECASE)), relation, frequency)


def forbidden_words(response: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return holds(response.lower().count(letter.lower()), let_relation, let_frequency)


def _language(response: str) -> str | None:
    """The ISO code of its language; None when it is not written in letters."""
    try:
        from langdetect import DetectorFactory, LangDetectException, detect
    except ImportError:
        raise ValueError("instructions about a language need the package langdetect: pip install langdetect") from None
    DetectorFactory.seed = 0  # it guesses with random numbers
    try:
        return detect(response)
    except LangDetectException:
        return None


def response_language(response: str, language: str) -> bool:
    return _language(response) in (language, None)


def english_capital(response: str) -> bool:
    return response.isupper() and _language(response) in ("en", None)


def english_lowercase(response: str) -> bool:
    return response.islower() and _language(response) in ("en", None)


def number_sentences(response: str, num_sentences: int, relation: str) -> bool:
    return holds(len(sentences(response)), relation, num_sentences)


def number_words(response: str, num_words: int, relation: str) -> bool:
    return holds(count_words(response), relation, num_words)


def number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Separated by ***; only the first and the last part may be empty."""
    parts = [part.strip() for part in response.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Separated by two newlines."""
    parts = response.split("\n\n")
    if sum(bool(part.strip()) for part in parts) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    part = parts[nth_paragraph - 1].strip()
    word = re.match(r"[^.,?!'\"]*", part.split()[0].lstrip("'\"")) if part else None
    return word is not None and word[0].lower() == first_word.lower()


def number_placeholders(response: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", response)) >= num_placeholders


def postscript(response: str, postscript_marker: str) -> bool:
    marker = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(marker, response.lower()) is not None


def number_bullet_lists(response: str, num_bullets: int) -> bool:
    lines = [line.lstrip() for line in response.splitlines()]
    stars = sum(line.startswith("*") and len(line) > 1 and line[1] != "*" for line in lines)
    return stars + sum(line.startswith("-") for line in lines) == num_bullets


def constrained_response(response: str) -> bool:
    return any(allowed in response for allowed in _CONSTRAINED)


def number_highlighted_sections(response: str, num_highlights: int) -> bool:
    """*so* or **so**; the second counts as highlighted however it is read."""
    single = [found for found in re.findall(r"\*[^\n*]*\*", response) if found.strip("*").strip()]
    double = [found for found in re.findall(r"\*\*[^\n*]*\*\*", response) if found.strip("*").strip()]
    return len(single) + len(double) >= num_highlights


def multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", response)) >= num_sections


def json_format(response: str) -> bool:
    text = response.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    lines = [(line, line.find("<<"), line.rfind(">>")) for line in response.split("\n")]
    return any(0 <= start < end and line[start:end].strip("<> \t") for line, start, end in lines)


def two_responses(response: str) -> bool:
    """Two different ones with ****** between them."""
    parts = [part.strip() for part in response.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_word_frequency(response: str, capital_frequency: int, capital_relation: str) -> bool:
    return holds(sum(word.isupper() for word in tokens(response)), capital_relation, capital_frequency)


def no_comma(response: str) -> bool:
    return "," not in response


def quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: dict[str, Check] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
