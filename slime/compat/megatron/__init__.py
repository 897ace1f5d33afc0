"""Other people's code, room megatron-core: what its published wheel needs before we build on it.

`prepare()` must run before the first `import megatron.core` of a process. It does two things:

* `host_build` (only where torch has no CUDA): an import hook that rewrites the *device words* of megatron-core's own
  modules (`torch.cuda.current_device()`, `device="cuda"`, `.cuda()` ...). Nothing outside `megatron.core` changes.
* `guards` (everywhere): corrections of version bugs, one entry each with reason, version range, upstream place and the
  test that fails as soon as the correction is obsolete.

`APPLIED` lists what was done in this process, for the start-up report.
"""

from __future__ import annotations

import importlib.metadata
import sys

APPLIED: list[str] = []

OLDEST, NEWEST = (0, 16, 1), (0, 19, 99)


def version() -> tuple[int, ...]:
    """The installed megatron-core as integers, e.g. (0, 16, 1)."""
    text = importlib.metadata.version("megatron-core")
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit())


def prepare() -> None:
    """Make `import megatron.core` safe on this machine; the second call does nothing."""
    if APPLIED:
        return
    found = version()
    if not OLDEST <= found <= NEWEST:
        raise ValueError(
            f"megatron-core {'.'.join(map(str, found))} is outside the tried range {'.'.join(map(str, OLDEST))} ... "
            f"{'.'.join(map(str, NEWEST[:2]))}.x; install the version that the project's constraints file pins"
        )
    import torch

    on_host = not torch.cuda.is_available()
    if on_host:
        # Pipeline code imports pieces of megatron.core lazily, so a partly imported package would mix two devices.
        early = [name for name in sys.modules if name == "megatron.core" or name.startswith("megatron.core.")]
        if early:
            raise RuntimeError(f"megatron.core was imported before slime.compat.megatron.prepare(): {sorted(early)[:3]}")
        from slime.compat.megatron import host_build

        host_build.install()
        APPLIED.append("host_build: megatron.core speaks of the CPU where it said cuda (torch itself unchanged)")
    from slime.compat.megatron import guards

    for guard in guards.GUARDS:
        if guard.applies(found, on_host):
            guard.apply()
            APPLIED.append(f"{guard.name}: {guard.reason}")
