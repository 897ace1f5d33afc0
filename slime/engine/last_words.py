"""What a server that ended had to say: the errors of its log, not the requests that it still answered."""

from __future__ import annotations

import re
from pathlib import Path

LAST_LINES = 25
# Only the end of a log is read: a server that ran for days has written gigabytes.
_READ_BYTES = 256 * 1024

# Lines of business as usual: uvicorn's access log, SGLang's statistics of batches, the router's requests.
_ROUTINE = re.compile(
    r'"(GET|POST|PUT|DELETE|HEAD) \S+ HTTP/[\d.]+" \d{3}|\b(Prefill|Decode) batch\b|\bHTTP Request: '
    r"|Cache flushed|\bstatus=\d{3}\b.*\blatency="
)
_ERROR = re.compile(
    r"\bTraceback \(most recent call last\)|\b(ERROR|CRITICAL|FATAL)\b|\b\w*(Error|Exception)\b[:(]|Fatal Python error"
    r"|\bSIG[A-Z]{3,4}\b|[Oo]ut of memory|\bkilled\b|\bpanicked\b|terminate called|Segmentation fault|\bAborted\b"
)


def last_words(log_path: Path) -> str:
    """ "; its log PATH ends" and the lines, or what is left to say where there is no log that can be read here."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(0, log_path.stat().st_size - _READ_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return f"; its log {log_path} cannot be read from here"
    told = select(lines)
    return f"; its log {log_path} ends\n" + "\n".join("  " + line[:400] for line in told)


def select(lines: list[str]) -> list[str]:
    """At most LAST_LINES: from the last error on, with what led to it where there is room; else the last lines of substance."""
    told = [line for line in lines if line.strip() and not _ROUTINE.search(line)]
    if not told:
        return ["(nothing but requests)"] if lines else ["(nothing)"]
    errors = [at for at, line in enumerate(told) if _ERROR.search(line)]
    if not errors or errors[-1] >= len(told) - LAST_LINES:
        return told[-LAST_LINES:]
    end = errors[-1] + 1 + LAST_LINES // 4  # the error is not at the end: it comes with some lines that follow
    return told[max(0, end - LAST_LINES) : end]
