"""A real fast tokenizer of 320 tokens for the tiny checkpoints: bytes, single digits, a few words of arithmetic, GLM's or
Qwen's markers.

Every string round-trips (all 256 byte symbols are pieces), every digit is one token, and `\\boxed{` is one token, so that the
answer of an arithmetic prompt is a handful of tokens. The pieces form a Unigram model: a word piece needs no chain of merges.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

VOCAB_SIZE = 320

# GLM-5.2 lists its markers in this order at the end of the vocabulary; <|endoftext|> pads and ends, a role marker ends a turn.
GLM_MARKERS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink",
)  # fmt: skip
GLM_STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")
QWEN_MARKERS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>",
)  # fmt: skip
QWEN_STOPS = ("<|im_end|>", "<|endoftext|>")

# Ordered by use: when the markers leave less room, the last ones are left out.
WORDS = (
    "\\boxed{", " plus", " minus", " times", " mod", " the", "What", " is", " last", " digit", " of", "Answer",
    " answer", " sum", "Compute", " and", " in", " a", " to", " =", " +", " -", " *", "Give", " only", " Give",
    " Answer", " number", "Question", " result", " with", " inside", "Put", " Put", " your", " it", " as", " two",
    "Solve", " Solve", " by", " from", "He", "Let", " we", " add", " carry", " step", " then", " so", " for", " final",
    " integer", " problem", " value", " question",
)  # fmt: skip

GLM_TEMPLATE = """[gMASK]<sop>
{%- if tools -%}
<|system|># Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}<|user|>{{ message.content }}
{%- elif message.role == 'system' -%}<|system|>{{ message.content }}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|observation|>{%- endif -%}
<tool_response>{{ message.content }}</tool_response>
{%- elif message.role == 'assistant' -%}<|assistant|>
{%- if message.reasoning_content -%}<think>{{ message.reasoning_content }}</think>{%- endif -%}
{%- if message.content -%}{{ message.content }}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
<tool_call>{{ call.function.name }}
{%- for key, value in call.function.arguments.items() -%}
<arg_key>{{ key }}</arg_key><arg_value>{{ value if value is string else value | tojson }}</arg_value>
{%- endfor -%}</tool_call>
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- if enable_thinking -%}<think>{%- endif -%}{%- endif -%}"""

QWEN_TEMPLATE = """{%- if tools -%}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|im_start|>user{%- endif %}
<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}<|im_end|>
{% endif -%}
{%- else -%}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


@dataclass(frozen=True)
class Family:
    """What distinguishes the two tokenizers: markers, end tokens (the first one also is `eos_token`), chat template."""

    markers: tuple[str, ...]
    stops: tuple[str, ...]
    template: str


FAMILIES = {"glm": Family(GLM_MARKERS, GLM_STOPS, GLM_TEMPLATE), "qwen": Family(QWEN_MARKERS, QWEN_STOPS, QWEN_TEMPLATE)}


@dataclass(frozen=True)
class TokenizerFacts:
    """What config.json and generation_config.json need to know."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int


def write_tokenizer(directory: Path, family_name: str, *, max_length: int) -> TokenizerFacts:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja: what AutoTokenizer reads, offline."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    family = FAMILIES[family_name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = VOCAB_SIZE - len(alphabet) - len(family.markers)
    words = [word.replace(" ", "\u0120") for word in WORDS[:room]]
    assert len(words) == room, f"{room} word pieces are wanted to reach {VOCAB_SIZE} tokens, WORDS holds {len(words)}"
    # A word costs less than its letters together, so the Viterbi segmentation always prefers the longest word.
    pieces = [(symbol, -10.0) for symbol in alphabet] + [(word, -11.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in family.markers])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "eos_token": family.stops[0],
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "extra_special_tokens": list(family.markers),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(family.template)
    return TokenizerFacts(
        vocab_size=VOCAB_SIZE,
        eos_token_ids=tuple(tokenizer.token_to_id(marker) for marker in family.stops),
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )
