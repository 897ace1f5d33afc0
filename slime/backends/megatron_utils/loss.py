"""The path that users' flags know: --custom-tis-function-path slime.backends.megatron_utils.loss.icepop_function."""

from __future__ import annotations

from slime.training.importance_functions import icepop_function, vanilla_tis_function

__all__ = ["icepop_function", "vanilla_tis_function"]
