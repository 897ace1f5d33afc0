# ruff: noqa: E501 (lines of a template are as long as what they write)
"""Chat templates that behave as the released ones of the families that people use, and a small byte tokenizer with each family's tokens.

The templates are ours; what they do with thoughts, tool calls, tool results, white space and ends of turns is what the released
ones do. `{% generation %}` stands where a model would generate: `released()` takes it out, so that the tokenizer's own
assistant mask of the marked template is the judge of the mask found in the unmarked one.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

QWEN3 = """{%- if tools -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools><|im_end|>
{% elif messages[0].role == 'system' -%}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif -%}
{%- set seen = namespace(open=true, query=messages|length - 1) -%}
{%- for message in messages[::-1] -%}
{%- set at = messages|length - 1 - loop.index0 -%}
{%- if seen.open and message.role == 'user' and message.content is string and not message.content.startswith('<tool_response>') -%}
{%- set seen.open = false -%}{%- set seen.query = at -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = message.content if message.content is string else '' -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' -%}
{%- set thoughts = '' -%}
{%- if message.reasoning_content is string -%}{%- set thoughts = message.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\\n' }}{% generation %}
{%- if loop.index0 > seen.query and (loop.last or thoughts) -%}
{{ '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else -%}{{ content }}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- if (loop.first and content) or not loop.first -%}{{ '\\n' }}{%- endif -%}
{%- set call = call.function or call -%}
{{ '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments if call.arguments is string else call.arguments | tojson -}}{{ '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}"""

QWEN25 = """{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{%- endif -%}
{%- if tools -%}{%- for tool in tools -%}{{ tool | tojson }}{%- endfor -%}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ '<|im_start|>assistant' }}{{ '\\n' }}{% generation %}
{%- if message.content -%}{{ message.content }}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- if call.function is defined -%}{%- set call = call.function -%}{%- endif -%}
{{ '\\n' if message.content or not loop.first else '' }}{{ '<tool_call>\\n{"name": "' }}{{ call.name }}{{ '", "arguments": ' }}{{ call.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- elif message.role == 'tool' -%}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- else -%}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# The prompt opens the thoughts, thoughts of earlier turns are dropped unless preserve_thinking, a user must have asked.
QWEN35 = """{%- if not messages -%}{{ raise_exception('No messages.') }}{%- endif -%}
{%- set seen = namespace(query=-1) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set seen.query = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if seen.query < 0 -%}{{ raise_exception('No user query found in messages.') }}{%- endif -%}
{%- for message in messages -%}
{%- set content = message.content | trim -%}
{%- if message.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}
{%- if (preserve_thinking is defined and preserve_thinking) or loop.index0 > seen.query -%}
{{ '<think>\\n' }}{% generation %}{{ (message.reasoning_content or '') + '\\n</think>\\n\\n' + content + '<|im_end|>' }}{% endgeneration %}
{%- else -%}{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}
{%- endif -%}{{ '\\n' }}
{%- else -%}{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"""

_GLM = """[gMASK]<sop>
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content is iterable and content is not mapping -%}
{%- for part in content -%}{%- if part is mapping -%}{{ part.text }}{%- else -%}{{ part }}{%- endif -%}{%- endfor -%}
{%- else -%}{{ content }}{%- endif -%}
{%- endmacro -%}
{%- if tools -%}{{ '<|system|>NL# Tools' }}{%- for tool in tools -%}{{ '\\n' }}{{ tool | tojson }}{%- endfor -%}{%- endif -%}
{%- set seen = namespace(user=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set seen.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{ '<|user|>NL' + text_of(m.content) }}
{%- if NOTHINK and enable_thinking is defined and not enable_thinking -%}{{ '/nothink' }}{%- endif -%}
{%- elif m.role == 'assistant' -%}
{{ '<|assistant|>' }}{% generation %}
{%- set thoughts, content = '', text_of(m.content) -%}
{%- if m.reasoning_content is string -%}{%- set thoughts = m.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set thoughts = content.split('</think>')[0].split('<think>')[-1] -%}
{%- set content = content.split('</think>')[-1] -%}
{%- endif -%}
{%- if (KEEP or loop.index0 > seen.user) and thoughts -%}{{ 'NL<think>' + thoughts.strip() + '</think>' }}
{%- else -%}{{ 'EMPTY' }}{%- endif -%}
{%- if content.strip() -%}{{ 'NL' + content.strip() }}{%- endif -%}
{%- for call in m.tool_calls or [] -%}
{%- if call.function -%}{%- set call = call.function -%}{%- endif -%}
{{ 'NL<tool_call>' + call.name }}
{%- for key, value in call.arguments.items() -%}
{{ 'NL<arg_key>' + key + '</arg_key>NL<arg_value>' }}{{ value if value is string else value | tojson }}{{ '</arg_value>' }}
{%- endfor -%}{{ 'NL</tool_call>' }}
{%- endfor -%}{% endgeneration %}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|observation|>' }}{%- endif -%}
{{ 'NL<tool_response>NL' + m.content + 'NL</tool_response>' }}
{%- elif m.role == 'system' -%}{{ '<|system|>NL' + text_of(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}PROMPT{%- endif -%}"""

# GLM-4.5 and 4.6: a new line after each marker, /nothink behind the question, an empty pair for a turn without thoughts.
GLM46 = (
    _GLM.replace("PROMPT", "{{ '\\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}")
    .replace("EMPTY", "\\n<think></think>").replace("NOTHINK", "true").replace("KEEP", "false").replace("NL", "\\n")
)  # fmt: skip
# GLM-4.7 and 5: no new lines, the prompt opens or closes the thoughts, clear_thinking keeps those of earlier turns.
GLM5 = (
    _GLM.replace("PROMPT", "{{ '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}")
    .replace("EMPTY", "</think>").replace("NOTHINK", "false").replace("NL", "")
    .replace("KEEP", "(clear_thinking is defined and not clear_thinking)")
)  # fmt: skip

# V3 and R1 before 3.1: calls are written only where the content is none, arguments must be text, one call alone is not closed,
# an answer after a tool's output has no marker. R1 cuts what is before </think>, and its prompt opens the thoughts.
_DEEPSEEK = """{%- set ns = namespace(tool=false, first=true, system='') -%}
{%- for message in messages -%}{%- if message.role == 'system' -%}{%- set ns.system = message.content -%}{%- endif -%}{%- endfor -%}
{{ bos_token + ns.system }}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.tool = false -%}{{ '<｜User｜>' + message.content }}{%- endif -%}
{%- if message.role == 'assistant' and message.content is none -%}
{%- set ns.tool = false -%}
{{ '<｜Assistant｜>' }}{% generation %}
{%- for call in message.tool_calls -%}
{{ '<｜tool▁calls▁begin｜>' if loop.first else '\\n' }}
{{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```<｜tool▁call▁end｜>' }}
{%- if not loop.first -%}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}{%- endif -%}
{%- endfor -%}{% endgeneration %}
{%- elif message.role == 'assistant' -%}
{%- set content = message.contentCUT -%}
{{ '<｜tool▁outputs▁end｜>' if ns.tool else '<｜Assistant｜>' }}{% generation %}{{ content + '<｜end▁of▁sentence｜>' }}{% endgeneration %}
{%- set ns.tool = false -%}
{%- endif -%}
{%- if message.role == 'tool' -%}
{{ '\\n' if ns.tool else '<｜tool▁outputs▁begin｜>' }}{%- set ns.tool = true -%}
{{ '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
{%- endif -%}
{%- endfor -%}
{%- if ns.tool -%}{{ '<｜tool▁outputs▁end｜>' }}{%- endif -%}
{%- if add_generation_prompt and not ns.tool -%}{{ '<｜Assistant｜>PROMPT' }}{%- endif -%}"""
DEEPSEEK_V3 = _DEEPSEEK.replace("CUT", "").replace("PROMPT", "")
DEEPSEEK_R1 = _DEEPSEEK.replace("CUT", ".split('</think>')[-1]").replace("PROMPT", "<think>\\n")

# V3.1: the prompt opens or closes the thoughts, turns of the past close them at once; calls are always closed.
DEEPSEEK_V31 = """{{ bos_token }}
{%- set ns = namespace(asked=false, tool=false) -%}{%- set thinking = thinking if thinking is defined else false -%}
{%- for message in messages -%}{%- if message.role == 'system' -%}{{ message.content }}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.asked = true -%}{%- set ns.tool = false -%}{{ '<｜User｜>' + message.content }}
{%- elif message.role == 'assistant' -%}
{{ '<｜Assistant｜></think>' if ns.asked else '' }}{% generation %}
{%- set ns.asked = false -%}
{%- if message.tool_calls -%}
{%- set ns.tool = false -%}{{ message.content or '' }}{{ '<｜tool▁calls▁begin｜>' }}
{%- for call in message.tool_calls -%}
{{ '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments + '<｜tool▁call▁end｜>' }}
{%- endfor -%}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
{%- else -%}
{{ (message.content if ns.tool else message.content.split('</think>', 1)[-1]) + '<｜end▁of▁sentence｜>' }}{%- set ns.tool = false -%}
{%- endif -%}{% endgeneration %}
{%- elif message.role == 'tool' -%}
{%- set ns.tool = true -%}{{ '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.asked and not ns.tool -%}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{%- endif -%}"""

LLAMA3 = """{{ bos_token }}
{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content | trim -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages -%}
{%- if not (message.role in ('ipython', 'tool') or 'tool_calls' in message) -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if message.role == 'assistant' -%}{% generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else -%}{{ message.content | trim + '<|eot_id|>' }}{%- endif -%}
{%- elif 'tool_calls' in message -%}
{%- if message.tool_calls | length != 1 -%}{{ raise_exception('This model only supports single tool-calls at once!') }}{%- endif -%}
{%- set call = message.tool_calls[0].function -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% generation %}
{{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}' }}
{{- '<|eom_id|>' if builtin_tools is defined else '<|eot_id|>' }}{% endgeneration %}
{%- else -%}
{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
{{- (message.content if message.content is string else message.content | tojson) + '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""

# Llama-3 before 3.1: no tools, and what the text begins with is written inside the loop.
LLAMA30 = """{%- for message in messages -%}
{{ bos_token if loop.first else '' }}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{%- if message.role == 'assistant' -%}{% generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else -%}{{ message.content | trim + '<|eot_id|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"""

# The prompt is written inside the loop, as a part of the last message, and no marker is a special token.
IN_LOOP = """{%- for message in messages -%}
{{ '### ' + message.role + '\\n' }}
{%- if message.role == 'assistant' -%}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- else -%}{{ message.content }}{%- endif -%}{{ '\\n' }}
{%- if loop.last and add_generation_prompt -%}{{ '### assistant\\n' }}{%- endif -%}
{%- endfor -%}"""

_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_GLM_MARKERS = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "/nothink")
_DEEPSEEK_MARKERS = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
)  # fmt: skip
_LLAMA_MARKERS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family's template, tokens and peculiarities."""

    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()
    """Tokens of their own that are not special, as <think> is in the released tokenizers."""


FAMILIES = {
    "qwen3": Family(QWEN3, _CHATML, "<|im_end|>", added=_THINK),
    "qwen3-base": Family(QWEN3, _CHATML, "<|endoftext|>", added=_THINK),
    "qwen2.5": Family(QWEN25, _CHATML, "<|im_end|>", added=_THINK[2:4]),
    "qwen3.5": Family(QWEN35, _CHATML, "<|im_end|>", added=_THINK),
    "glm4.6": Family(GLM46, _GLM_MARKERS, "<|endoftext|>", added=_THINK),
    "glm5": Family(GLM5, _GLM_MARKERS, "<|endoftext|>", added=_THINK),
    "deepseek-v3": Family(DEEPSEEK_V3, _DEEPSEEK_MARKERS, "<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>"),
    "deepseek-r1": Family(
        DEEPSEEK_R1, _DEEPSEEK_MARKERS, "<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>", added=_THINK[:2]
    ),
    "deepseek-v3.1": Family(
        DEEPSEEK_V31, _DEEPSEEK_MARKERS, "<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>", added=_THINK[:2]
    ),
    "llama3": Family(LLAMA3, _LLAMA_MARKERS, "<|eot_id|>", bos="<|begin_of_text|>"),
    "llama3.0": Family(LLAMA30, _LLAMA_MARKERS, "<|eot_id|>", bos="<|begin_of_text|>"),
    "in-loop": Family(IN_LOOP, ("</s>",), "</s>"),
}


def released(template: str) -> str:
    """The template without the marks of what a model generates."""
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def tokenizer_of(name: str, *, marked: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the family's tokens, and merges that a border could fall into: two new lines, two blanks."""
    family = FAMILIES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "a")]
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Llama's released tokenizer tells offsets without the blanks before a word, the others with them.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=name.startswith("llama3"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=family.eos, bos_token=family.bos)
    fast.chat_template = family.template if marked else released(family.template)
    return fast
