"""Who this process is among all ranks, and which groups it belongs to.

In: the parallel sizes of the config, rank and world size. Out: `Ranks`, frozen, over megatron.core.parallel_state.
Must never know: models, data, losses.
"""

from slime.parallel.ranks import ParallelSizes, Ranks, check_sizes, init_ranks

__all__ = ["ParallelSizes", "Ranks", "check_sizes", "init_ranks"]
