"""Runtime shims for SGLang on a CPU, applied at import time of the module concerned.

Nothing here imports torch or SGLang until the engine does, so other Pythons started under this PYTHONPATH stay quick.
SLIME_SGLANG_SHIMS_OFF=name,name switches shims off; the tests use it to see whether one is still needed.

| shim | needed by | reason |
|---|---|---|
| triton | sglang 0.5.15.post1 - 0.5.23 | triton has no CPU build; SGLang's own stand-in is installed on macOS only |
| torchvision | sglang 0.5.15.post1 - 0.5.23 | imported at module level for image models; its wheel needs CUDA torch |
| sgl_kernel | sglang 0.5.15.post1 - 0.5.23 | the CPU build of the kernels is not published |
| mooncake_indices | sglang 0.5.20 - 0.5.23 | prefill stages KV indices in pinned memory and a CUDA event |
| host_register | sglang 0.5.17 - 0.5.23 | host buffers are registered with the CUDA runtime |
| fork | sglang 0.5.15.post1 - 0.5.23 | every rank and the detokenizer would import SGLang anew, 10 s of a core each |
| loopback_store | torch 2.11 - 2.13 | the ranks' TCPStore listens on every interface, without any authentication |
| mooncake_bind | mooncake 0.3.13 | the KV transfer listens on every interface, without any authentication (slime_bind.py) |
| bootstrap_token | sglang 0.5.15.post1 - 0.5.23 | a prefill engine's bootstrap server answers anybody (slime_bootstrap.py) |
"""

from __future__ import annotations

import enum
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types

_OFF = frozenset(filter(None, os.environ.get("SLIME_SGLANG_SHIMS_OFF", "").split(",")))


def _installed(name: str) -> bool:
    return any(
        finder.find_spec(name, None) is not None
        for finder in sys.meta_path
        if not isinstance(finder, _Finder) and hasattr(finder, "find_spec")
    )


# ---- stand-ins for packages that are absent -------------------------------------------------------------------------


def _refuse(qualified: str):
    def refuse(*args, **kwargs):
        raise RuntimeError(f"{qualified} has no CPU build; the engine reached a CUDA-only path of SGLang")

    refuse.__name__ = qualified.rsplit(".", 1)[-1]
    return refuse


def _torchvision(module: types.ModuleType) -> None:
    """srt/multimodal/internvl_utils.py imports names at module level; text models call none of them."""

    def missing(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _refuse(f"{module.__name__}.{name}")

    module.__getattr__ = missing
    module.__path__ = []
    if module.__name__ == "torchvision":
        module.__version__ = "0.0.0"

    # transformers sees the stand-in, takes torchvision for present and builds a table from these members.
    modes = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
    module.InterpolationMode = enum.Enum("InterpolationMode", {mode.replace("-", "_").upper(): mode for mode in modes})


def _sgl_kernel(module: types.ModuleType) -> None:
    """kernels/ops/kvcache/cache_move.py and srt/mem_cache/allocation.py import from it at module level."""

    def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
        """Write each request's new KV slots into its row: rows[i, start:end] = the next end - start of out_cache_loc."""
        taken = 0
        bounds = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
        for row, start, end in bounds:
            count = end - start
            req_to_token[row, start:end] = out_cache_loc[taken : taken + count].to(req_to_token.dtype)
            taken += count

    def missing(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _refuse(f"sgl_kernel.{name}")

    module.__version__ = "0.0.0+cpu"
    module.assign_req_to_token_pool_cpu = assign_req_to_token_pool_cpu
    module.__getattr__ = missing


def _install_triton() -> None:
    """SGLang's stand-in (sglang/_platform_stubs.py) behind its macOS test: loaded by path, told that this is a Mac.

    Only its triton part is wanted: the patches of torch.mps are harmless, the wrapper round Tensor.copy_ is left out.
    """
    package = importlib.util.find_spec("sglang")
    path = os.path.join(package.submodule_search_locations[0], "_platform_stubs.py")
    spec = importlib.util.spec_from_file_location("_slime_sglang_platform_stubs", path)
    stubs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = stubs
    spec.loader.exec_module(stubs)
    import torch

    stubs.platform = types.SimpleNamespace(machine=lambda: "arm64")
    stubs.sys = types.SimpleNamespace(platform="darwin", modules=sys.modules, meta_path=sys.meta_path)
    stubs._patch_non_blocking = lambda: None
    available, torch.backends.mps.is_available = torch.backends.mps.is_available, lambda: True
    try:
        stubs.install_platform_stubs()
    finally:
        torch.backends.mps.is_available = available


def _define_torchvision_schemas() -> None:
    """An installed torchvision registers fake kernels for operators that its CUDA-only library would have defined."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)  # a Library that is collected takes its definitions with it


# ---- patches after import -------------------------------------------------------------------------------------------


def _mooncake_indices(module: types.ModuleType) -> None:
    """srt/disaggregation/prefill.py: senders with this attribute get their indices through pin_memory=True."""
    module.MooncakeKVSender.supports_host_tensor_indices = False


def _host_register(module: types.ModuleType) -> None:
    """srt/mem_cache/pool_host/common.py: pinning needs torch.cuda.cudart(); pageable memory serves a CPU."""
    module._cuda_host_register = lambda *args, **kwargs: None


def _loopback_store(module: types.ModuleType) -> None:
    """torch/distributed/rendezvous.py: a store at this engine's address gets a socket bound there and kept to the run."""
    import socket

    plain = module.TCPStore

    def store(*args, **kwargs):
        address, peers = os.environ.get("MC_TCP_BIND_ADDRESS", "127.0.0.1"), os.environ.get("SLIME_ENGINE_PEERS", "")
        mine = kwargs.get("is_master") and kwargs.get("host_name") in ("127.0.0.1", "localhost", address)
        if not mine or kwargs.get("master_listen_fd") is not None:
            return plain(*args, **kwargs)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((socket.gethostbyname(kwargs["host_name"]), kwargs["port"]))
        if peers:
            from slime.compat.peers import only_from

            only_from(listener, peers.split(","))
        listener.listen(128)
        return plain(*args, **kwargs, master_listen_fd=listener.detach())

    module.TCPStore = store


def _mooncake_bind(module: types.ModuleType) -> None:
    import slime_bind

    slime_bind.after_import(module)


def _bootstrap_token(module: types.ModuleType) -> None:
    import slime_bind
    import slime_bootstrap

    slime_bootstrap.after_import(module)
    slime_bind.keep_announcements()


def _fork(module: types.ModuleType) -> None:
    """srt/entrypoints/engine.py chooses "spawn", as CUDA demands; it starts its processes before it has threads or sockets."""
    configure = module._set_envs_and_config

    def configure_and_fork(server_args):
        configure(server_args)
        module.mp.set_start_method("fork", force=True)

    module._set_envs_and_config = configure_and_fork


_KEPT: list[object] = []
TOKEN = ""
"""The run's secret, once slime.engine.serve has read it; ranks are forked after that."""
_STAND_INS = {"torchvision": _torchvision, "sgl_kernel": _sgl_kernel}
_AFTER_IMPORT = {
    "sglang.srt.disaggregation.mooncake.conn": ("mooncake_indices", _mooncake_indices),
    "sglang.srt.mem_cache.pool_host.common": ("host_register", _host_register),
    "sglang.srt.entrypoints.engine": ("fork", _fork),
    "torch.distributed.rendezvous": ("loopback_store", _loopback_store),
    "mooncake.engine": ("mooncake_bind", _mooncake_bind),
    "sglang.srt.disaggregation.common.conn": ("bootstrap_token", _bootstrap_token),
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for absent packages, and runs a patch once its module has been executed."""

    def __init__(self) -> None:
        self.busy: set[str] = set()

    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if name in self.busy:
            return None
        if name == "sglang" and "triton" not in _OFF:
            self.busy.add(name)
            if "triton" not in sys.modules and not _installed("triton"):
                _install_triton()
        elif root in _STAND_INS and root not in _OFF:
            if not _installed(root):
                # sgl_kernel is no package: SGLang guards its submodules (scalar_type) with `except ImportError`.
                if root == "sgl_kernel" and name != root:
                    return None
                return importlib.machinery.ModuleSpec(name, self, is_package=root != "sgl_kernel")
            if name == "torchvision":
                self.busy.add(name)
                _define_torchvision_schemas()
        elif name in _AFTER_IMPORT and _AFTER_IMPORT[name][0] not in _OFF:
            return self._patched_spec(name)
        return None

    def _patched_spec(self, name: str):
        self.busy.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy.discard(name)
        if spec is None:
            return None
        execute, patch = spec.loader.exec_module, _AFTER_IMPORT[name][1]

        def exec_module(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        _STAND_INS[module.__name__.partition(".")[0]](module)


sys.meta_path.insert(0, _Finder())
