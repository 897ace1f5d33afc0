"""Connections from an address of the caller's choice."""

from __future__ import annotations

import socket


def connects(address: tuple[str, int], *, source: str) -> bool:
    """Whether a listener takes a connection from `source`, an address of this machine; a filter lets the call wait."""
    with socket.socket() as caller:
        caller.settimeout(0.5)
        caller.bind((source, 0))
        try:
            caller.connect(address)
        except TimeoutError:
            return False
        return True
