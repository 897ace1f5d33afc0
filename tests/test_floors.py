"""Imports go down only, and what is tied to one place stays there. Read from the sources: nothing is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {
    0: {"config", "types"},
    1: {"algorithms", "batch"},
    2: {"device", "parallel", "observability", "compat", "ops"},
    3: {"rollout", "engine", "training", "weights", "model"},
    4: {"ray"},
    5: {"train", "train_async", "rehearse", "preflight", "utils", "backends"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

SIDEWAYS = {
    ("parallel", "slime.compat"),  # prepare() comes before the first import of megatron.core, everywhere
    ("train_async", "slime.train"),  # the same loop by another name
    ("preflight", "slime.rehearse"),  # the plan says what a node must have
    ("parallel", "slime.device"),  # a grid is set up with the device's collectives
    ("rollout", "slime.engine.client"),
    ("training", "slime.model"),
    ("weights", "slime.model"),
}
"""(room, module it may import on its own floor): the arrows of the design."""

TORCH_CUDA_ROOMS = {"device", "ops", "compat"}
SGLANG_ROOMS = {"engine", "compat"}
ENVIRON_ROOMS = {"ray", "device"}


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    room: str
    module: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def sources(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py"))


def room_of(path: Path) -> str:
    """`engine` for slime/engine/x.py, `train` for slime/train.py, `` for slime/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return "" if parts == ("__init__",) else parts[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, text: str | None = None) -> Iterator[Import]:
    """Every import, those inside functions and of dotted names given to importlib included."""
    file, room, own = str(path.relative_to(ROOT)), room_of(path), module_name(path).split(".")
    package = own if path.name == "__init__.py" else own[:-1]
    tree = ast.parse(path.read_text() if text is None else text)
    for node in _without_type_checking(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            # `from slime import weights` imports slime.weights, so a name of a package counts as a module.
            found = [f"{module}.{alias.name}" if module in ("slime", "slime_plugins") else module for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            if node.args and isinstance(node.args[0], ast.Constant):
                found = [str(node.args[0].value)]
        for module in dict.fromkeys(found):
            yield Import(file, node.lineno, room, module)


def _without_type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`, which name a type for the reader and import nothing when run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield node
        yield from _without_type_checking(node)


def upward(one: Import) -> bool:
    """Whether an import of the slime package breaks the floors."""
    parts = one.module.split(".")
    if parts[0] == "slime_plugins":
        return not one.file.startswith("slime_plugins")
    if parts[0] != "slime" or len(parts) == 1:
        return False
    room = parts[1]
    if one.file.startswith("slime_plugins"):
        return FLOOR_OF[room] > 2 and room != "model"
    if room == one.room or one.room == "":
        return False
    if FLOOR_OF[room] == FLOOR_OF[one.room]:
        return not any(one.room == who and (one.module + ".").startswith(what + ".") for who, what in SIDEWAYS)
    return FLOOR_OF[room] > FLOOR_OF[one.room]


def all_imports() -> list[Import]:
    return [one for package in ("slime", "slime_plugins") for path in sources(package) for one in imports_of(path)]


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in sources("slime")} - {""}
    assert rooms <= set(FLOOR_OF), f"rooms without a floor: {rooms - set(FLOOR_OF)}"


def test_imports_go_down_only():
    assert [str(one) for one in all_imports() if upward(one)] == []


@pytest.mark.parametrize(
    ("file", "text", "wrong"),
    [
        ("slime/batch/x.py", "from slime.training import loss", True),
        ("slime/batch/x.py", "def f():\n    from slime import training", True),
        ("slime/batch/x.py", "import slime.types.sample", False),
        ("slime/rollout/x.py", "from slime.engine.client import EngineClient", False),
        ("slime/rollout/x.py", "from slime.engine.process import EngineProcess", True),
        ("slime/weights/x.py", "from slime.model.names import NameTable", False),
        ("slime/model/x.py", "from slime.training import loss", True),
        ("slime/utils/x.py", "from slime.rollout.plugins import load_function", False),
        ("slime/rollout/x.py", "from slime.utils.misc import load_function", True),
        ("slime/rehearse/x.py", "from slime.utils.types import Sample", True),
        ("slime/ray/x.py", "import slime.training.trainer", False),
        ("slime/types/x.py", "from ..batch import layout", True),
        ("slime/types/x.py", "if TYPE_CHECKING:\n    from slime.batch import layout", False),
        ("slime/model/x.py", "importlib.import_module('slime_plugins.models')", True),
        ("slime_plugins/x.py", "import slime.model.names", False),
        ("slime_plugins/x.py", "import slime.engine.client", True),
    ],
)
def test_the_reader_sees_wrong_imports(file: str, text: str, wrong: bool):
    found = [one for one in imports_of(ROOT / file, text) if upward(one)]
    assert bool(found) == wrong


def test_config_imports_neither_torch_nor_numpy():
    heavy = {"torch", "numpy", "megatron", "sglang", "ray", "transformers"}
    assert [str(one) for one in all_imports() if one.room == "config" and one.module.split(".")[0] in heavy] == []


def test_sglang_is_imported_in_engine_and_compat_alone():
    found = [one for one in all_imports() if one.module.split(".")[0] == "sglang" and one.room not in SGLANG_ROOMS]
    assert [str(one) for one in found] == []


def _uses_of(path: Path, wanted: str) -> list[str]:
    """Places where the dotted name `wanted` (or something below it) is used."""
    hits = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == wanted:
            hits.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return hits


def test_torch_cuda_is_named_in_device_ops_and_compat_alone():
    """Kernels of plugins live in an `ops` folder too."""
    found = [
        hit
        for package in ("slime", "slime_plugins")
        for path in sources(package)
        if room_of(path) not in TORCH_CUDA_ROOMS and "ops" not in path.relative_to(ROOT).parts
        for hit in _uses_of(path, "torch.cuda")
    ]
    found += [
        str(one)
        for one in all_imports()
        if one.module.startswith("torch.cuda") and one.room not in TORCH_CUDA_ROOMS and "/ops/" not in one.file
    ]
    assert found == []


def environment_writes(text: str) -> list[int]:
    """Lines that change os.environ: assignment, deletion, update, setdefault, pop, putenv."""
    lines = []
    for node in ast.walk(ast.parse(text)):
        targets = (
            node.targets
            if isinstance(node, ast.Assign | ast.Delete)
            else [node.target]
            if isinstance(node, ast.AugAssign)
            else []
        )
        if any(
            isinstance(target, ast.Subscript) and ast.unparse(target.value) in ("os.environ", "environ") for target in targets
        ):
            lines.append(node.lineno)
        changing = ("update", "setdefault", "pop", "clear", "popitem")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {
            f"{name}.{verb}" for name in ("os.environ", "environ") for verb in changing
        }:
            lines.append(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.putenv", "os.unsetenv"):
            lines.append(node.lineno)
    return lines


def test_the_environment_is_written_in_ray_and_device_alone():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for package in ("slime", "slime_plugins")
        for path in sources(package)
        if room_of(path) not in ENVIRON_ROOMS
        for line in environment_writes(path.read_text())
    ]
    assert found == []


def test_the_reader_sees_environment_writes():
    lines = [
        "import os",
        "os.environ['A'] = '1'",
        "os.environ.setdefault('B', '2')",
        "x = os.environ['A']",
        "del os.environ['A']",
    ]
    assert sorted(environment_writes("\n".join(lines))) == [2, 3, 5]
