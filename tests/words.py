"""Is a sentence that a user reads spelled as the documents spell, and are the flags that it names there?"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from slime.config.command_line import flag_table
from slime.rehearse.command import OWN

ROOT = Path(__file__).resolve().parents[1]
FLAG = re.compile(r"--[\w-]+(?:[ =](?!is\b|needs\b)[^\s;:,]+)?")
ELSEWHERE = ("--sglang-", "--router-")
"""Beginnings of flags that other packages declare."""
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
MORE_WORDS = frozenset(
    """divisor mixes backend info exclude expandable balances separate warms double swap manual external critical verbose
    adapters noise dummy network's unterminated subpattern penalty nowhere localhost warn inf sinkhorn spiral moo ftp
    varying entries dashes sourced balanced csv integer measure positive contradict iteration's roles lrr Expecting
    property enclosed char confirm defines biased architectures pull subscriptable repair NoneType Errno Unterminated
    stray writable GlmMoeDsaForCausalLM maybe fcfs lof lpm awq mori ib IP HOST PORT NGRAM""".split()
)
"""Words of messages, and values of the tests' mistakes, that no document has."""


@functools.lru_cache(maxsize=1)
def vocabulary() -> frozenset[str]:
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    return MORE_WORDS.union(*(WORD.findall(page.read_text(encoding="utf-8")) for page in pages))


@functools.lru_cache(maxsize=4096)
def strange_words(sentence: str) -> tuple[str, ...]:
    """Words that no document has, and flags that nobody declares; what is quoted, and paths, are the user's own."""
    plain = re.sub(r"'[^']*'(?!\w)|\"[^\"]*\"|`[^`]*`", " ", sentence)
    plain = re.sub(r"(?<!-)\S*/\S*|unknown flag \S+", " ", plain)
    flags = [found.group(0).split(" ")[0].split("=")[0] for found in FLAG.finditer(plain)]
    strange = [flag for flag in flags if not (flag in flag_table() or flag in OWN or flag.startswith(ELSEWHERE))]
    for token in FLAG.sub(" ", plain).split():
        token = token.strip(".,:;()[]{}")
        if re.search(r"[\d=.<>|@{}\[\]\\]", token):
            continue
        if "_" in token:
            strange += [token] if token not in (token.lower(), token.upper()) else []
            continue
        words = WORD.findall(token)
        strange += [word for word in words if word not in vocabulary() and word[0].lower() + word[1:] not in vocabulary()]
    return tuple(strange)
