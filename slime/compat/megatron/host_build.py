"""megatron-core on a machine without CUDA: its modules are compiled with other device words.

Reason: megatron-core 0.16.1 ... 0.19.2 writes `torch.cuda.current_device()`, `device="cuda"`, `.cuda()`, `pin_memory=True`
and the type name `torch.cuda.FloatTensor` in about 90 files, also where a CPU tensor would do.
Upstream: none planned (NVIDIA/Megatron-LM supports CUDA only).
Obsolete when: `tests/model/test_compat_megatron.py::test_megatron_core_still_needs_the_host_build` fails.

The rewrite happens in the importer, on the syntax tree, for `megatron.core.*` alone: torch keeps its own behaviour for
every other package of the process, which patched `torch.cuda` functions would not.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import sys
import types

import torch

_NAME = "_slime_host_torch"
_HOST = torch.device("cpu")


class _NullEvent:
    """Stands for torch.cuda.Event where nothing runs asynchronously."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def record(self, *args: object) -> None: ...
    def wait(self, *args: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


class _NullStream:
    """Stands for torch.cuda.Stream; every operation is already complete when it returns."""

    device = _HOST

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def wait_stream(self, other: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: _NullEvent | None = None) -> _NullEvent:
        return event or _NullEvent()

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *exc: object) -> bool:
        return False


def _identity_compile(function=None, *args, **kwargs):
    """torch.compile on the CPU costs 15 s of start-up for nothing at these sizes."""
    return function if function is not None else (lambda inner: inner)


def _host_module() -> types.ModuleType:
    stream = _NullStream()

    def nothing(*args: object, **kwargs: object) -> None:
        return None

    def zero(*args: object, **kwargs: object) -> int:
        return 0

    words = types.SimpleNamespace(
        current_device=lambda: _HOST,
        set_device=nothing,
        device_count=lambda: 1,
        synchronize=nothing,
        empty_cache=nothing,
        is_available=lambda: False,
        is_initialized=lambda: False,
        is_current_stream_capturing=lambda: False,
        memory_allocated=zero,
        max_memory_allocated=zero,
        memory_reserved=zero,
        max_memory_reserved=zero,
        memory_stats=lambda *args: {},
        reset_peak_memory_stats=nothing,
        get_device_capability=lambda *args: (0, 0),
        Stream=_NullStream,
        Event=_NullEvent,
        current_stream=lambda *args: stream,
        default_stream=lambda *args: stream,
        stream=lambda *args: contextlib.nullcontext(),
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        manual_seed=lambda seed: torch.default_generator.manual_seed(seed),
        manual_seed_all=lambda seed: torch.default_generator.manual_seed(seed),
        random=types.SimpleNamespace(
            get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
            set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        ),
        nvtx=types.SimpleNamespace(range_push=nothing, range_pop=nothing),
        FloatTensor=torch.FloatTensor,
        HalfTensor=torch.HalfTensor,
        BFloat16Tensor=torch.BFloat16Tensor,
        CUDAGraph=torch.cuda.CUDAGraph,
        OutOfMemoryError=torch.cuda.OutOfMemoryError,
        amp=torch.cuda.amp,
    )
    module = types.ModuleType(_NAME)
    module.cuda = words
    module.HOST = _HOST
    module.compile = _identity_compile
    return module


def _host(attribute: str) -> ast.expr:
    return ast.Attribute(ast.Name(_NAME, ast.Load()), attribute, ast.Load())


class _DeviceWords(ast.NodeTransformer):
    """Rewrites one module; every visitor says which word it turns."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """torch.cuda.x -> host.cuda.x, torch.compile -> identity."""
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in ("cuda", "compile"):
            return ast.copy_location(_host(node.attr), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """device="cuda", pin_memory=True, torch.device("cuda"), tensor.cuda()."""
        self.generic_visit(node)
        for keyword in node.keywords:
            constant = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg == "device" and isinstance(constant, str) and constant.startswith("cuda"):
                keyword.value = _host("HOST")
            if keyword.arg == "pin_memory" and constant is True:
                keyword.value = ast.Constant(False)
        called = node.func
        if not isinstance(called, ast.Attribute):
            return node
        if called.attr == "cuda" and not (isinstance(called.value, ast.Name) and called.value.id in ("torch", _NAME)):
            return ast.copy_location(ast.Call(ast.Attribute(called.value, "to", ast.Load()), [_host("HOST")], []), node)
        if called.attr == "device" and node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == "cuda":
            return ast.copy_location(_host("HOST"), node)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """The type names that the optimizers compare with Tensor.type()."""
        if isinstance(node.value, str) and node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
            return ast.copy_location(ast.Constant(node.value.replace("torch.cuda.", "torch.")), node)
        return node


class _HostLoader(importlib.machinery.SourceFileLoader):
    """Compiles from source, never from or to __pycache__ (the cache belongs to the unchanged file)."""

    def get_code(self, fullname: str):
        path = self.get_filename(fullname)
        data = self.get_data(path)
        if b"cuda" not in data and b"torch.compile" not in data and b"pin_memory" not in data:
            return super().get_code(fullname)
        tree = _DeviceWords().visit(ast.parse(data, path))
        first = next(i for i, node in enumerate([*tree.body, None]) if not _is_prologue(node))
        tree.body.insert(first, ast.Import([ast.alias(_NAME)]))
        ast.fix_missing_locations(tree)
        return compile(tree, path, "exec", dont_inherit=True)


def _is_prologue(node: ast.stmt | None) -> bool:
    """Docstring and __future__ imports must stay first."""
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


class _HostFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != "megatron.core" and not fullname.startswith("megatron.core."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _HostLoader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Register the importer. The caller has checked that there is no CUDA and no megatron.core yet."""
    sys.modules[_NAME] = _host_module()
    sys.meta_path.insert(0, _HostFinder())
