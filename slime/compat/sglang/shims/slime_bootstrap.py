"""The bootstrap server of a prefill engine asks for the run's token, and those that talk to it send it.

SGLang lets anybody who reaches the port register a prefill rank or ask where the KV memory of one is. Everything of it is in
one module: the aiohttp server, and calls through the `requests` package, of which that module gets a copy whose sessions know
the token.
"""

from __future__ import annotations

import hmac
import sys
import types


def token() -> str:
    """The run's, which slime.engine.serve has left with the shims; "" where there is none."""
    return getattr(sys.modules["sitecustomize"], "TOKEN", "")


def after_import(module: types.ModuleType) -> None:
    """module: sglang.srt.disaggregation.common.conn"""
    module.requests = with_token(module.requests)
    web, set_up = module.web, module.CommonKVBootstrapServer._setup_routes

    @web.middleware
    async def ask(request, handler):
        given = request.headers.get("Authorization", "")
        if token() and not hmac.compare_digest(given.encode(), f"Bearer {token()}".encode()):
            return web.Response(status=401, text="this bootstrap server answers the run's own engines")
        return await handler(request)

    def set_up_and_ask(self) -> None:
        set_up(self)
        self.app.middlewares.append(ask)

    module.CommonKVBootstrapServer._setup_routes = set_up_and_ask


def with_token(requests: types.ModuleType) -> types.ModuleType:
    """A copy of the package whose sessions, and calls without a session, send the token."""
    copy = types.ModuleType(requests.__name__, requests.__doc__)
    vars(copy).update(vars(requests))

    class Session(requests.Session):
        def __init__(self) -> None:
            super().__init__()
            if token():
                self.headers["Authorization"] = f"Bearer {token()}"

    def call(method: str):
        def once(url: str, **options):
            with Session() as session:
                return session.request(method, url, **options)

        return once

    copy.Session = Session
    copy.get, copy.put, copy.post = call("GET"), call("PUT"), call("POST")
    return copy
