"""What is said about an exception of code that is not ours: its kind, its words, and the lines of the user's own files."""

from __future__ import annotations

import sysconfig
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

_OURS = Path(__file__).resolve().parents[1]
_LIBRARIES = tuple({str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_FRAMES_SHOWN = 3


def _is_users(frame: traceback.FrameSummary) -> bool:
    path = str(Path(frame.filename).resolve())
    return not frame.filename.startswith("<") and _OURS not in Path(path).parents and not path.startswith(_LIBRARIES)


def users_lines(frames: Iterable[traceback.FrameSummary]) -> str:
    """`file:line in function: code`, the innermost of the user's frames first; empty if none is the user's."""
    own = [frame for frame in frames if _is_users(frame)]
    shown = [f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in reversed(own[-_FRAMES_SHOWN:])]
    return ", called from ".join(shown)


def told(error: BaseException) -> str:
    """One line: `KeyError: 'gold' (/home/me/rewards.py:12 in reward: gold = row["gold"])`."""
    own = users_lines(traceback.extract_tb(error.__traceback__))
    words = " ".join(str(error).split("\n"))
    return f"{type(error).__name__}: {words}" + (f" ({own})" if own else "")


def by_reason(failures: Counter) -> str:
    """`grading_timeout 3, generation_EngineError 1`."""
    return ", ".join(f"{reason} {count}" for reason, count in failures.most_common())
