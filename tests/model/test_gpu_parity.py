"""The tiny GLM-5.2 in bf16 on GPUs: as far from float32 on the CPU as bf16 on the CPU is, under every layout of two GPUs.

The checkpoint is the smallest one that the CUDA kernels accept, with fewer layers. Key selections and expert choices are those
of the float32 run, replayed (see model.replay).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_ranks import run_processes
from model.parity import StepResult, run_step, samples_of, whole_grads
from model.replay import Choices

from slime.model.hf_config import read_hf_config

LENGTHS = ((300, 33, 1, 400), (3, 500, 20))
TWO_GPUS = {"TP2": {"tp": 2}, "PP2, 2 + 3 layers": {"pp": 2, "first": 2}, "CP2": {"cp": 2}, "EP2": {"ep": 2}, "DP2": {}}
Results = dict[str, tuple[StepResult, dict]]
"""Layout -> (its step, experts chosen)."""


def steps_of(rank: int, world: int, checkpoint: str, layouts: dict[str, dict], replayed: Choices | None) -> Results:
    vocab = read_hf_config(checkpoint)["vocab_size"]
    micro_batches = [samples_of(40 + n, lengths, vocab) for n, lengths in enumerate(LENGTHS)]
    results = {}
    for name, layout in layouts.items():
        choices = replayed or Choices()
        results[name] = (run_step(rank, world, checkpoint, micro_batches, choices, **layout), choices.experts)
    return results


class Measured:
    """Distances from the float32 run on the CPU."""

    def __init__(self, checkpoint: str, folder: Path) -> None:
        self.checkpoint, self.hf, self.folder = checkpoint, read_hf_config(checkpoint), folder
        (alone,) = run_processes(1, steps_of, 1, checkpoint, {"": {}}, None, folder=folder / "exact", on_host=True)
        self.float32, experts = alone[""]
        keys = {key: picked for key, (_, picked) in self.float32.indices.items()}
        self.choices, self.wanted = Choices(keys, experts, replays=True), whole_grads(self.hf, [self.float32])

    def distances(self, name: str, world: int, layouts: dict, *, gpu: bool) -> dict[str, tuple[float, float]]:
        """Layout -> (largest relative distance of a gradient, largest difference of a log-probability) in bf16."""
        rounded = {layout: {**values, "dtype": "bf16"} for layout, values in layouts.items()}
        job = (world, self.checkpoint, rounded, self.choices)
        results = run_processes(world, steps_of, *job, folder=self.folder / name, on_host=not gpu)
        found = {}
        for layout in layouts:
            steps = [result[layout][0] for result in results]
            grads = whole_grads(self.hf, steps)
            gradient = max(((grads[n] - self.wanted[n]).norm() / self.wanted[n].norm()).item() for n in self.wanted)
            log_prob = max(
                (values - self.float32.log_probs[number]).abs().max().item()
                for step in steps
                for number, values in zip(step.numbers, step.log_probs, strict=False)
            )
            found[layout] = (gradient, log_prob)
        return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    from tools.make_tiny_checkpoint import main

    folder = tmp_path_factory.mktemp("gpu")
    main(["--preset", "h200", "--num-hidden-layers", "5", "--seed", "0", "--output-bf16", str(folder / "bf16")])
    return Measured(str(folder / "bf16"), folder)


def _bounded(found: dict[str, tuple[float, float]], alone: tuple[float, float], factor: float) -> None:
    for layout, (gradient, log_prob) in found.items():
        assert gradient < factor * alone[0] and log_prob < factor * alone[1], (layout, gradient, log_prob, alone)


@pytest.mark.gpu
@pytest.mark.slow
def test_one_gpu_in_bf16_is_as_far_from_float32_as_a_cpu_in_bf16(measured: Measured) -> None:
    alone = measured.distances("host", 1, {"one rank": {}}, gpu=False)["one rank"]
    _bounded(measured.distances("gpu", 1, {"one GPU": {}}, gpu=True), alone, 2.0)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_over_nccl_are_as_far_from_float32_as_one(measured: Measured) -> None:
    alone = measured.distances("one", 1, {"one GPU": {}}, gpu=True)["one GPU"]
    _bounded(measured.distances("two", 2, TWO_GPUS, gpu=True), alone, 1.5)
