"""The host device: what a laptop answers. The CUDA side is tested where there is one."""

from __future__ import annotations

import pickle

import pytest
import torch

from slime.device import get_device
from slime.device.host import HostDevice


def test_the_choice_is_made_once_and_says_why() -> None:
    device = get_device()
    assert device is get_device()
    assert device.kind == ("cuda" if torch.cuda.is_available() else "host")
    assert device.backend == {"cuda": "nccl", "host": "gloo"}[device.kind] and device.reason


def test_the_host_trains_in_float32_and_says_why() -> None:
    host = HostDevice()
    assert host.default_params_dtype is torch.float32 and "slower" in host.default_params_dtype_reason
    assert host.torch_device == torch.device("cpu")


def test_memory_grows_by_what_is_allocated() -> None:
    host = HostDevice()
    before = host.memory()
    kept = torch.ones(2**24)  # 64 MiB, touched
    after = host.memory()
    assert after.used - before.used >= 0.9 * kept.numel() * 4
    assert after.used <= after.peak <= after.total


def test_sleep_on_the_host_moves_nothing_and_says_so() -> None:
    host, weight = HostDevice(), torch.arange(6.0)
    report = host.sleep({"weight": weight})
    assert report.nbytes == 0 and "nowhere to move" in report.note
    assert host.wake().nbytes == 0 and weight.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_shared_tensor_is_plain_bytes_without_the_storage_behind_a_view() -> None:
    host, big = HostDevice(), torch.arange(100_000.0)
    payload = host.share(big[10:14])
    assert len(payload) < 2000  # the storage behind the view is 400,000 bytes
    assert pickle.loads(payload).tolist() == [10, 11, 12, 13]


def test_a_container_of_tensors_is_shared_too() -> None:
    value = pickle.loads(HostDevice().share([("a", torch.ones(2, dtype=torch.bfloat16)), ("b", torch.tensor([3]))]))
    assert value[0][0] == "a" and value[0][1].dtype == torch.bfloat16 and value[1][1].item() == 3


@pytest.mark.gpu
def test_sleep_frees_the_gpu_and_wake_brings_every_view_back() -> None:
    device = get_device()
    device.init_process(0)
    buffer = torch.arange(2**24, device=device.torch_device, dtype=torch.float32)
    view, wanted = buffer[5:9], [5.0, 6.0, 7.0, 8.0]
    before = torch.cuda.memory_allocated()
    spent = torch.ones(2**20, device=device.torch_device)
    asleep = device.sleep({"buffer": buffer, "view": view}, unread={"spent": spent, "view again": view})
    assert asleep.nbytes == 2**26 + 2**22 and before - torch.cuda.memory_allocated() >= 2**26
    assert device.wake().nbytes == 2**26 + 2**22
    assert spent.zero_().sum().item() == 0.0, "its memory is there again"
    assert view.tolist() == wanted and buffer[-1].item() == 2**24 - 1
