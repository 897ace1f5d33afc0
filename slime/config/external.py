"""Addresses of engines that somebody else runs."""

from __future__ import annotations

import re

from slime.config.errors import ConfigError

_ADDRESS = re.compile(r"(?:http://)?(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:/\[\]@?#]+):(?P<port>\d+)/?")


def engine_url(text: str) -> str:
    """ "10.0.0.7:30000" or "http://[fd00::7]:30000" as "http://host:port". Raises ConfigError for anything else."""
    found = _ADDRESS.fullmatch(text)
    if found is None or not 1 <= int(found["port"]) <= 65535:
        raise ConfigError(
            f"--rollout-external-engine-addrs {text!r} is no host:port (http alone; an IPv6 address in brackets); write "
            "it like "
            "10.0.0.7:30000"
        )
    return f"http://{found['host'].lower()}:{int(found['port'])}"
