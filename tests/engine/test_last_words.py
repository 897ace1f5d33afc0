"""What is shown of the log of a server that ended: its errors, not its requests."""

from __future__ import annotations

from slime.engine.last_words import LAST_LINES, last_words, select

ACCESS = [f'[2026-11-30 10:05:{n:02d}] INFO:     127.0.0.1:{n} - "POST /generate HTTP/1.1" 200 OK' for n in range(40)]
BATCHES = [f"[2026-11-30 10:05:{n:02d}] Decode batch, #running-req: {n}, #token: 12" for n in range(40)]
TRACEBACK = [
    "[2026-11-30 10:06:00] Scheduler hit an exception: Traceback (most recent call last):",
    '  File "scheduler.py", line 3, in run',
    "    forward()",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
]


def test_requests_and_statistics_are_not_last_words():
    assert select([*BATCHES, "loading was quick", *ACCESS]) == ["loading was quick"]
    assert select(ACCESS) == ["(nothing but requests)"]
    assert select([]) == ["(nothing)"]


def test_an_error_is_shown_although_the_server_went_on_talking():
    chatter = [f"step {n} is done" for n in range(100)]
    told = select([*chatter, *TRACEBACK, *ACCESS, *chatter])
    assert len(told) == LAST_LINES and all(line in told for line in TRACEBACK)
    assert told.index(TRACEBACK[-1]) >= LAST_LINES - 8, "what led to it comes before it"


def test_a_log_without_errors_ends_with_its_last_lines():
    lines = [f"step {n} is done" for n in range(100)]
    assert select(lines) == lines[-LAST_LINES:]


def test_the_log_is_named_and_a_log_that_is_elsewhere_is_said(tmp_path):
    log = tmp_path / "decode.log"
    assert last_words(log) == f"; its log {log} cannot be read from here"
    log.write_text("\n".join([*ACCESS, *TRACEBACK]) + "\n")
    assert last_words(log) == f"; its log {log} ends\n" + "\n".join(f"  {line}" for line in TRACEBACK)


def test_only_the_end_of_a_long_log_is_read(tmp_path):
    log = tmp_path / "decode.log"
    log.write_text("ERROR: long ago\n" + "a quiet line\n" * 40_000)
    assert "long ago" not in last_words(log)
