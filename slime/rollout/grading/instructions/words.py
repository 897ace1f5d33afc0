"""IFBench: instructions about words, letters and counts."""

from __future__ import annotations

import re
import string
from collections import Counter

from slime.rollout.grading.instructions.text import EDGES, Check, bare_words, num_words, sentences, tokens

_CONJUNCTIONS = {"and", "but", "for", "nor", "or", "so", "yet"}
_NAMES = (
    "Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander Amelia Benjamin Harper Leo "
    "Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel Ella Jacob Scarlett Nathan Victoria Elijah Layla Nicholas "
    "Audrey David Hannah Christopher Penelope Thomas Nora Andrew Aria Joseph Claire Ryan Stella Jonathan"
).split()
_PRONOUNS = set(
    "i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers herself "
    "it its itself they them their theirs themselves".split()
)
_CONSONANTS = set(string.ascii_lowercase) - set("aeiou")
_JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


def word_count_range(response: str, min_words: int, max_words: int) -> bool:
    return min_words <= num_words(response) <= max_words


def unique_word_count(response: str, N: int) -> bool:
    return len({word.strip(EDGES) for word in response.lower().split()}) >= N


def conjunctions(response: str, small_n: int) -> bool:
    return len({word.strip(EDGES).lower() for word in response.split()} & _CONJUNCTIONS) >= small_n


def person_names(response: str, N: int) -> bool:
    return sum(name in response for name in _NAMES) >= N


def overlap(response: str, reference_text: str, percentage: float) -> bool:
    """Share of the response's different trigrams of characters that the reference has too, within 2 %."""
    given, wanted = ({text[i : i + 3] for i in range(len(text) - 2)} for text in (response, reference_text))
    return bool(given) and abs(100 * len(given & wanted) / len(given) - percentage) <= 2


def numbers(response: str, N: int) -> bool:
    return len(re.findall(r"\d+", response.translate(str.maketrans("", "", string.punctuation)))) == N


def alphabet(response: str) -> bool:
    """Every word begins with the next letter, after z with a."""
    letters = [word[0].lower() for word in bare_words(response)]
    if not letters or letters[0] not in string.ascii_lowercase:
        return False
    first = ord(letters[0]) - ord("a")
    return letters == [chr(ord("a") + (first + place) % 26) for place in range(len(letters))]


def vowel(response: str) -> bool:
    """One paragraph with at most three different vowels."""
    text = response.strip().lower()
    return "\n" not in text and len(set(text) & set("aeiou")) <= 3


def consonants(response: str) -> bool:
    """Two consonants together in every word."""
    return all(
        any(one in _CONSONANTS and other in _CONSONANTS for one, other in zip(word, word[1:], strict=False))
        for word in response.lower().split()
    )


def palindrome(response: str) -> bool:
    return sum(len(word) >= 5 and word == word[::-1] for word in bare_words(response.lower())) >= 10


def punctuation(response: str) -> bool:
    """. , ! ? ; : each, and an interrobang besides."""
    for mark in ("?!", "!?", "‽"):
        if mark in response:
            return set(".,!?;:") <= set(response.replace(mark, "", 1))
    return False


def prime_lengths(response: str) -> bool:
    def is_prime(n: int) -> bool:
        return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))

    return all(is_prime(len(word)) for word in bare_words(response))


def words_japanese(response: str, N: int) -> bool:
    """Every N-th word, numbers excepted."""
    every = [word.strip(EDGES) for word in response.split()][N - 1 :: N]
    return all(not word or word.isdigit() or _JAPANESE.search(word) for word in every)


def repeats(response: str, small_n: int) -> bool:
    return max(Counter(bare_words(response.lower())).values(), default=0) <= small_n


def pronouns(response: str, N: int) -> bool:
    return sum(word in _PRONOUNS for word in bare_words(response.lower().replace("/", " "))) >= N


def last_first(response: str) -> bool:
    """Each sentence begins with the last word of the one before."""
    found = sentences(response)
    for before, after in zip(found, found[1:], strict=False):
        last, first = before.rstrip(EDGES).split()[-1:], after.lstrip(EDGES).split()[:1]
        if not last or not first or last[0].lower() != first[0].lower():
            return False
    return True


def paragraph_last_first(response: str) -> bool:
    """Every paragraph ends with the word it began with."""
    words = [line.strip().lower().strip(EDGES).split() for line in response.split("\n")]
    return all(not line or line[0] == line[-1] for line in words)


def no_consecutive(response: str) -> bool:
    """No two words in a row with one first letter."""
    letters = [word[0] for word in bare_words(response.lower())]
    return all(one != other for one, other in zip(letters, letters[1:], strict=False))


def keywords_multiple(response: str, keyword1: str, keyword2: str, keyword3: str, keyword4: str, keyword5: str) -> bool:
    wanted = zip((keyword1, keyword2, keyword3, keyword4, keyword5), (1, 2, 3, 5, 7), strict=True)
    return all(response.lower().count(word.strip().lower()) == times for word, times in wanted)


def keywords_specific_position(response: str, keyword: str, n: int, m: int) -> bool:
    """The m-th word of the n-th sentence."""
    found = sentences(response)
    return n <= len(found) and tokens(found[n - 1])[m - 1 : m] == [keyword]


def words_position(response: str, keyword: str) -> bool:
    """The second word and the second to last."""
    found = tokens(response)
    return len(found) >= 2 and found[1] == found[-2] == keyword


CHECKS: dict[str, Check] = {
    "count:word_count_range": word_count_range,
    "count:unique_word_count": unique_word_count,
    "count:conjunctions": conjunctions,
    "count:person_names": person_names,
    "ratio:overlap": overlap,
    "count:numbers": numbers,
    "words:alphabet": alphabet,
    "words:vowel": vowel,
    "words:consonants": consonants,
    "words:palindrome": palindrome,
    "count:punctuation": punctuation,
    "words:prime_lengths": prime_lengths,
    "count:words_japanese": words_japanese,
    "words:repeats": repeats,
    "count:pronouns": pronouns,
    "words:last_first": last_first,
    "words:paragraph_last_first": paragraph_last_first,
    "words:no_consecutive": no_consecutive,
    "count:keywords_multiple": keywords_multiple,
    "words:keywords_specific_position": keywords_specific_position,
    "words:words_position": words_position,
}
