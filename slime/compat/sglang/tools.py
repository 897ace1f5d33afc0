"""A correction of SGLang on every machine: /parse_function_call of the GLM parser asks a tool for a field that it has not.

The parsers read `tool.function.strict`, which the type of /v1/chat/completions has and that of /parse_function_call has not
(srt/managers/io_struct.py, sglang 0.5.23): with glm47 every request is answered 500. `tests/engine/test_shims.py` says when it
is obsolete.
"""

from __future__ import annotations


def give_tools_their_field() -> None:
    from sglang.srt.managers.io_struct import Function

    if not hasattr(Function, "strict"):
        Function.strict = False  # what SGLang's other type has where a request says nothing
