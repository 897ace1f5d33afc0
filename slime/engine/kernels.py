"""Kernels that engines compile: kept in one folder for all nodes and runs, and compiled side by side while weights load.

SGLang compiles a kernel when it is first called, one after the other, most of them while the first CUDA graph is captured.
What a scheduler asked its compiler for is written to a list; an engine that finds a list starts this module beside itself,
which asks for the same before the scheduler comes to it. Where both want one kernel, SGLang's own lock lets one compile and
the other wait.

    python3 -m slime.engine.kernels LIST...        (started by slime.engine.serve, not by hand)
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LISTS = Path(__file__).resolve().parent / "kernel_lists"
"""<model_type>-sglang-<version>.jsonl of models whose start was recorded."""
LISTS_VARIABLE = "SLIME_KERNEL_LISTS"
"""Files joined by os.pathsep; the first is the one to record in, where it is not empty."""
MODULE_PREFIX = "sgl_kernel_jit_"


def cache_key() -> str:
    """Compiled code of other versions is neither found nor overwritten."""
    return "-".join(f"{package}-{_version(package)}" for package in ("sglang", "torch"))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def cache_environment(folder: str | Path) -> dict[str, str]:
    """Where an engine's compilers keep what they made: all below one folder, which nodes may share.

    From 0.5.23 on SGLANG_CACHE_DIR is enough for all but its own compiler's; older versions know the others by their own names.
    """
    base = Path(folder).absolute() / cache_key()
    places = {
        "SGLANG_CACHE_DIR": "", "SGLANG_JIT_CACHE_DIR": "jit", "SGLANG_DG_CACHE_DIR": "deep_gemm", "CUDA_CACHE_PATH": "nv",
        "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "FLASHINFER_WORKSPACE_BASE": "",
        "TVM_FFI_CACHE_DIR": "tvm-ffi",
    }  # fmt: skip
    return {name: str(base / place) for name, place in places.items()}


def list_environment(folder: str | Path | None, model_path: str | Path) -> dict[str, str]:
    """What `slime.engine.serve` is told: the list to record in (none without a folder), then the one that comes with slime."""
    recorded = str(Path(folder).absolute() / cache_key() / "kernels.jsonl") if folder else ""
    config = Path(model_path) / "config.json"
    model_type = json.loads(config.read_text()).get("model_type", "") if config.exists() else ""
    shipped = LISTS / f"{model_type}-sglang-{_version('sglang')}.jsonl"
    if not folder and not shipped.exists():
        return {}
    return {LISTS_VARIABLE: os.pathsep.join([recorded, str(shipped)])}


def record(target: Path) -> None:
    """From here on this process's `load_jit` calls are added to `target`, a JSON line for each that is not there.

    Comes before SGLang's kernels are imported, which take the function by name. Other versions compile in other ways: nothing
    is recorded there.
    """
    try:
        from sglang.kernels.jit import utils
        from sglang.kernels.jit.utils import compile as package
        from sglang.kernels.jit.utils.compile import loader
    except ImportError:
        return
    own = loader.load_jit

    def load_jit(*args: str, **asked: object):
        _add(target, args, asked)
        return own(*args, **asked)

    for module in (loader, package, utils):
        module.load_jit = load_jit


def _add(target: Path, args: Sequence[str], asked: Mapping[str, object]) -> None:
    paths = [path for name in ("cuda_files", "cpp_files", "extra_include_paths") for path in asked.get(name) or ()]
    if any(os.path.isabs(path) for path in paths):
        return  # of this machine alone
    line = json.dumps({"args": [str(arg) for arg in args], "asked": {k: v for k, v in asked.items() if v is not None}})
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and line in target.read_text().splitlines():
        return
    with target.open("a") as file:
        file.write(line + "\n")


def read_lists(files: Iterable[str]) -> list[dict]:
    """The different entries of the files that exist."""
    lines = [line for name in files if name and Path(name).exists() for line in Path(name).read_text().splitlines()]
    return [json.loads(line) for line in dict.fromkeys(lines) if line]


def missing(entries: Sequence[dict], environment: Mapping[str, str]) -> list[dict]:
    """Those of which the cache has no build at all, seen without SGLang. A build that no longer fits counts as one."""
    root = Path(environment.get("SGLANG_JIT_CACHE_DIR") or "~/.cache/sglang/jit").expanduser()
    built = {found.parent.name for found in root.glob(f"*/{MODULE_PREFIX}*/build-*")}
    return [entry for entry in entries if MODULE_PREFIX + "_".join(entry["args"]) not in built]


def build(entries: Sequence[dict], report: Callable[[str], None]) -> int:
    """Compiles all at once; the number that failed, which the scheduler will meet again and report better."""
    from sglang.kernels.jit.utils.compile.loader import load_jit

    began = time.monotonic()

    def one(entry: dict) -> bool:
        try:
            load_jit(*entry["args"], **{name: _tuples(value) for name, value in entry["asked"].items()})
        except Exception as error:
            report(f"kernel {'_'.join(entry['args'])} was not compiled ahead: {str(error).splitlines()[0]}")
            return False
        return True

    with ThreadPoolExecutor(max_workers=len(entries)) as pool:
        failed = list(pool.map(one, entries)).count(False)
    report(f"{len(entries) - failed} of {len(entries)} kernels compiled ahead in {time.monotonic() - began:.1f} s")
    return failed


def _tuples(value: object) -> object:
    """Pairs of names became lists in JSON."""
    return [tuple(item) if isinstance(item, list) else item for item in value] if isinstance(value, list) else value


def main(argv: Sequence[str]) -> int:
    entries = missing(read_lists(argv), os.environ)
    return build(entries, lambda line: print(line, flush=True)) if entries else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
