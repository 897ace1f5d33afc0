"""What a node would run: versions of packages and a hash of this project's sources, and whether nodes agree."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "megatron-core", "sglang", "ray", "transformers", "numpy", "sglang-router")
SOURCES = ("slime", "slime_plugins")
"""This project's own packages, of which nodes may have different checkouts."""
REMEDY = "run scripts/setup.sh on the named nodes; of slime, bring the head's checkout there (told is a hash of its files)"


def versions() -> dict[str, str]:
    """Package -> version, "-" where it is lacking; "python", and "slime" by its sources."""
    found = {name: _version(name) for name in PACKAGES}
    return found | {"python": platform.python_version(), "slime": source_digest(Path(__file__).resolve().parents[2])}


def differences(by_node: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Node -> `package version, the others version`, of the nodes that differ from most; where two have as many, from the
    first."""
    wrong: dict[str, list[str]] = {}
    for package in (*PACKAGES, "python", "slime"):
        found = {node: has.get(package, "-") for node, has in by_node.items()}
        usual = Counter(found.values()).most_common(1)[0][0]
        for node, has in found.items():
            if has != usual:
                wrong.setdefault(node, []).append(f"{package} {has}, the others {usual}")
    return {node: ", ".join(told) for node, told in wrong.items()}


def source_digest(root: Path) -> str:
    """Eight digits of a hash over every Python file of this project's packages: commits differ, versions do not."""
    hashed = hashlib.sha256()
    for file in sorted(path for name in SOURCES for path in (root / name).rglob("*.py")):
        hashed.update(f"{file.relative_to(root)}\n".encode())
        hashed.update(file.read_bytes())
    return hashed.hexdigest()[:8]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"
