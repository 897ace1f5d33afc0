"""The program of a router process: sglang-router, with the run's token from stdin and a life bound to its parent's."""

from __future__ import annotations

import dataclasses
import sys

from slime.engine.serve import read_token, stop_with_parent

# sglang-router 0.3.2 knows these policies (router.py: policy_from_str) but its own parser does not offer them.
HIDDEN_POLICIES = ("consistent_hashing", "prefix_hash")


def main() -> None:
    token = read_token()
    stop_with_parent()
    from sglang_router.launch_router import launch_router, parse_router_args

    argv = list(sys.argv[1:])
    hidden = {}
    for name in ("policy", "prefill_policy", "decode_policy"):
        for policy in HIDDEN_POLICIES:
            flag = f"--{name.replace('_', '-')}={policy}"
            if flag in argv:
                argv.remove(flag)
                hidden[name] = policy
    arguments = parse_router_args([*argv, *([f"--api-key={token}"] if token else [])])
    launch_router(dataclasses.replace(arguments, **hidden))


if __name__ == "__main__":
    main()
