"""Waiting for many actors at once, and saying who failed first."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray

# How long the others get to report after the first failure: the one that raised is the cause, those that hang in a
# collective are not.
_GRACE_SECONDS = 3.0


def gather(refs: Mapping[str, ray.ObjectRef], *, doing: str) -> dict[str, Any]:
    """Results by name. If one fails, RuntimeError with the cause, at once; ranks that then hang are not waited for."""
    names = {ref: name for name, ref in refs.items()}
    results: dict[str, Any] = {}
    pending = list(names)
    while pending:
        done, pending = ray.wait(pending, num_returns=1)
        for ref in done:
            try:
                results[names[ref]] = ray.get(ref)
            except ray.exceptions.RayError as error:
                raise RuntimeError(_explain(names, ref, error, pending, doing)) from None
    return {name: results[name] for name in refs}


def _explain(names: dict, first: ray.ObjectRef, error: Exception, pending: list, doing: str) -> str:
    failures = {names[first]: error}
    deadline = time.monotonic() + _GRACE_SECONDS
    while pending and time.monotonic() < deadline:
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        for ref in done:
            try:
                ray.get(ref)
            except ray.exceptions.RayError as other:
                failures[names[ref]] = other
    # A process that died or lost its peer is a consequence; an exception of our own code is a cause.
    causes = {
        name: failure for name, failure in failures.items() if isinstance(failure, ray.exceptions.RayTaskError)
    } or failures
    name, cause = next(iter(causes.items()))
    others = sorted(set(failures) - {name})
    also = f"\n(also failed: {', '.join(others)})" if others else ""
    hanging = f"\n(still waiting, now stopped: {', '.join(names[ref] for ref in pending)})" if pending else ""
    return f"{name} failed while {doing}:\n{_text(cause)}{also}{hanging}"


def _text(error: Exception) -> str:
    if isinstance(error, ray.exceptions.RayTaskError):
        # Raised by our own checks, its message is written for the user; the traceback is for everything else.
        if isinstance(error.cause, (ValueError, OSError)) and str(error.cause):
            return f"{type(error.cause).__name__}: {error.cause}"
        return str(error)
    return f"{type(error).__name__}: {error}"
