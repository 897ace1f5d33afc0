"""The run's tokenizer, loaded once per process."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any


def load_any_tokenizer(name_or_path: str, chat_template_path: str | None = None, **kwargs: Any) -> Any:
    """transformers' tokenizer of a folder or a name, for plugins; with the chat template of a file, where one is given."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    if chat_template_path:
        tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
    return tokenizer


@lru_cache(maxsize=8)
def load_tokenizer(hf_checkpoint: str | None) -> Any:
    """transformers' tokenizer of --hf-checkpoint. Raises ValueError when the folder has none."""
    from transformers import AutoTokenizer

    if not hf_checkpoint:
        raise ValueError("a tokenizer is needed: pass --hf-checkpoint FOLDER")
    if not (Path(hf_checkpoint) / "tokenizer_config.json").is_file():
        raise ValueError(f"--hf-checkpoint {hf_checkpoint} holds no tokenizer (no tokenizer_config.json)")
    return AutoTokenizer.from_pretrained(hf_checkpoint)
