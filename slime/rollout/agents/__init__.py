"""Generation in turns: tools, environments and whole agents, trained on exactly the tokens that the policy wrote.

    session.py    one execution: requests as messages, answers with their token ids; its turns become samples
    seam.py       what stands between a recorded answer and the next one, as text of the chat template
    calls.py      tool calls and thoughts in an answer, read by the engine's own parsers
    loop.py       a generate function made of tools; text of an environment between two requests
    endpoint.py   /v1/chat/completions in front of a session, for agent frameworks
    sandbox.py    Python that a model wrote, in a process with limits (confined.py)
    retrieval.py  BM25 over a list of passages

Comes in: a sample with a prompt. Goes out: samples whose tokens are what the engine was sent and what it answered, never an
encoding of their text. Must never know: training, Ray.
"""
