"""Waiting for many actors at once, and saying who failed first."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from slime.ray.fates import Process, death, fates, process_in
from slime.ray.standstill import Patience

logger = logging.getLogger(__name__)

# How long the others get to report after the first failure: the one that raised is the cause, those that hang in a
# collective are not.
_GRACE_SECONDS = 3.0
# A rank that lost its peer often reports before Ray has noticed that the peer's process has ended.
_DEATH_SECONDS = 20.0
_LOOK_SECONDS = 60.0
_TICK_SECONDS = 5.0
# What a rank says whose peer has gone: gloo's, NCCL's and the store's words.
_PEER_LOST = (
    "closed by peer", "reset by peer", "gloo/", "nccl", "broken pipe", "connection refused", "socket timeout", "timed out",
    "disterror", "diststoreerror", "distnetworkerror", "distbackenderror", "failed to recv", "wait timeout",
)  # fmt: skip


class ProcessLost(RuntimeError):
    """A process is gone, stands still or has lost its device: new ones may do the same work. Other errors would come again."""


def gather(
    refs: Mapping[str, ray.ObjectRef],
    *,
    doing: str,
    processes: Mapping[str, Process] | None = None,
    beside: Mapping[str, Process] | None = None,
    timeout: float | None = None,
    patience: Patience | None = None,
) -> dict[str, Any]:
    """Results by name. If one fails, RuntimeError with the cause, at once; ranks that then hang are not waited for. It is
    ProcessLost where the cause is no error of the code.

    processes: those behind the names, where they are known: one that is stopped is told while the others wait for it.
    beside: processes that take part and are not called here: told likewise, and a cause where all that answer lost a peer.
    timeout: seconds until RuntimeError names who has not answered; None waits for ever, or for as long as `patience` does,
    which also explains a wait that lasts.
    """
    names, processes, beside = {ref: name for name, ref in refs.items()}, processes or {}, beside or {}
    results: dict[str, Any] = {}
    pending, started, told = list(names), time.monotonic(), set()
    tell_at = started + _LOOK_SECONDS
    wait = patience.begin(doing) if patience is not None else None
    while pending:
        elapsed = time.monotonic() - started
        if timeout is not None and elapsed > timeout:
            spent = f"within {elapsed:.0f} s while {doing} (expected within {timeout:.0f} s)"
            raise _late([names[ref] for ref in pending], processes, doing, spent)
        due = min(tell_at - time.monotonic(), wait.seconds_left() if wait is not None else _LOOK_SECONDS)
        look_in = min(due, timeout or due, _TICK_SECONDS if wait is not None else due)
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, look_in))
        for ref in done:
            try:
                results[names[ref]] = ray.get(ref)
            except ray.exceptions.RayError as error:
                raise _explained(names, ref, error, pending, doing, processes, beside) from None
        if not done and processes and look_in >= due:  # before a report, whose questions such a process may hold up
            tell_at = time.monotonic() + _LOOK_SECONDS
            told |= _tell_unwell({names[ref]: processes[names[ref]] for ref in pending} | beside, doing, started, told)
        if not done and wait is not None:
            wait.look()
    if wait is not None:
        wait.end()
    return {name: results[name] for name in refs}


def _tell_unwell(processes: Mapping[str, Process], doing: str, started: float, told: set[str]) -> set[str]:
    unwell = _unwell({name: process for name, process in processes.items() if name not in told})
    for what in unwell.values():
        logger.warning("%s; %s has lasted %.0f s", what, doing, time.monotonic() - started)
    return set(unwell)


def _unwell(processes: Mapping[str, Process]) -> dict[str, str]:
    """Of those that are gone or stopped: name -> a clause with name, process and what happened."""
    found = fates(processes) if processes else {}
    return {name: f"{name} ({processes[name]}) {fate}" for name, fate in found.items() if fate is not None}


def _late(names: Sequence[str], processes: Mapping[str, Process], doing: str, spent: str) -> RuntimeError:
    """Of those that did not answer in time."""
    late = f"{', '.join(names)} did not answer {spent}"
    unwell = _unwell({name: processes[name] for name in names if name in processes})
    return ProcessLost(f"{', '.join(unwell.values())}, while {doing}; {late}") if unwell else RuntimeError(late)


def _explained(
    names: Mapping[ray.ObjectRef, str],
    first: ray.ObjectRef,
    error: Exception,
    pending: Sequence[ray.ObjectRef],
    doing: str,
    processes: Mapping[str, Process],
    beside: Mapping[str, Process],
) -> RuntimeError:
    failures = {names[first]: error}
    started = time.monotonic()
    while pending:
        patience = _DEATH_SECONDS if all(map(_lost_a_peer, failures.values())) else _GRACE_SECONDS
        left = started + patience - time.monotonic()
        if left <= 0:
            break
        done, pending = ray.wait(pending, num_returns=1, timeout=left)
        for ref in done:
            try:
                ray.get(ref)
            except ray.exceptions.RayError as other:
                failures[names[ref]] = other
    hanging = [names[ref] for ref in pending]
    cause, why = _cause(failures, hanging, processes, beside, doing)
    others = sorted(set(failures) - {cause})
    also = f"\n(it took others with it: {', '.join(others)})" if others else ""
    waiting = [name for name in hanging if name != cause]
    stopped = f"\n(still waiting, now stopped: {', '.join(waiting)})" if waiting else ""
    kind = RuntimeError if cause in beside else _kind(failures.get(cause))
    return kind(f"{why}{also}{stopped}")


def _cause(
    failures: Mapping[str, Exception],
    hanging: Sequence[str],
    processes: Mapping[str, Process],
    beside: Mapping[str, Process],
    doing: str,
) -> tuple[str, str]:
    """(who failed first, a sentence that says why). failures: in the order in which they were told.

    A process that was killed is a cause; so is an exception of our own code. One that ended by SIGABRT may have been ended by a
    collective whose peer had failed, and whoever lost a peer is a consequence.
    """
    own = [name for name, failure in failures.items() if _is_raised(failure) and not _lost_a_peer(failure)]
    dead = {name: _death(name, failure, processes.get(name)) for name, failure in failures.items() if not _is_raised(failure)}
    dead = dict(sorted(dead.items(), key=lambda item: "SIGABRT" in item[1]))  # stable: aborted ones last
    if dead and not (own and "SIGABRT" in next(iter(dead.values()))):
        name, how = next(iter(dead.items()))
        return name, f"{how}, while {doing}"
    if own:
        return own[0], f"{own[0]} failed while {doing}:\n{_text(failures[own[0]])}"
    known = {name: processes[name] for name in hanging if name in processes}
    unwell = _unwell({**known, **beside})
    name, failure = next(iter(failures.items()))
    lost = f"{name} waited for it:\n{_text(failure)}"
    if unwell:
        culprit, what = next(iter(unwell.items()))
        return culprit, f"{what}, while {doing}; {lost}"
    if known:
        culprit = next(iter(known))
        return culprit, f"{culprit} ({known[culprit]}) runs but did not take part, while {doing}; {lost}"
    return name, f"{name} failed while {doing}:\n{_text(failure)}"


def _kind(failure: Exception | None) -> type[RuntimeError]:
    """failure: of who failed first; None of one that has said nothing."""
    if failure is None or _lost_a_peer(failure) or _lost_its_device(failure):
        return ProcessLost
    return RuntimeError if _is_raised(failure) or _was_not_made(failure) else ProcessLost


def _is_raised(error: Exception) -> bool:
    """Raised in the actor's code, whose process lives; anything else of Ray's is about a process that is gone."""
    return isinstance(error, ray.exceptions.RayTaskError)


def _lost_a_peer(error: Exception) -> bool:
    if not _is_raised(error):
        return False
    if isinstance(error.cause, ProcessLost):  # told by the actor's own `gather`: a receiver, by the rank that sent to it
        return True
    said = f"{type(error.cause).__name__}: {error.cause}".lower()
    return isinstance(error.cause, RuntimeError) and any(words in said for words in _PEER_LOST)


def _lost_its_device(error: Exception) -> bool:
    """A GPU that fell off the bus, or met memory that it cannot correct: the process cannot use it again, a new one may."""
    said = str(error.cause).lower() if _is_raised(error) else ""
    return "cuda error:" in said and "out of memory" not in said


def _was_not_made(error: Exception) -> bool:
    return "creation task" in str(error)  # its constructor raised: the text is that traceback


def _death(name: str, error: Exception, process: Process | None) -> str:
    """Who died and of what."""
    if _was_not_made(error):
        return f"{name} could not be made: {str(error).strip()}"
    process = process or process_in(error)
    return f"{name}{f' ({process})' if process is not None else ''} {death(error, process)}"


def _text(error: Exception) -> str:
    """Raised by our own checks, its message is written for the user; the traceback is for everything else."""
    if not _is_raised(error):
        return f"{type(error).__name__}: {error}"
    cause = error.cause
    if isinstance(cause, (ValueError, OSError)) and str(cause):
        return f"{type(cause).__name__}: {cause}"
    places = re.findall(r'^ *File "(.+?)", line \d+', str(error), re.MULTILINE)
    ours = bool(places) and Path(places[-1]).is_relative_to(Path(__file__).parents[1])
    return str(cause) if ours and isinstance(cause, RuntimeError) and str(cause) else str(error)
