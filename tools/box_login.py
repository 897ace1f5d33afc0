"""The stand-in for sshd and ssh among the nodes of a box (tools/cluster_box.py), over the box's own network, which may be down.

    python box_login.py serve ADDRESS [PORT]      on the node, as long as it lives
    python box_login.py ask ADDRESS WORDS...      runs the words there by a shell, as ssh does, with this standard input

A question is one line of JSON, an answer several: what was written to either stream, and at last the status. Bytes travel as
latin-1. There is no password: the box's network reaches its own nodes alone.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from typing import IO

PORT = 22
CONNECT_SECONDS = 10.0
LOST = 255
"""Status where the node cannot be reached, or is lost meanwhile, as ssh has it."""
# Of the launchers' ssh: ServerAliveInterval 5, ServerAliveCountMax 3.
_ALIVE = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3), (socket.TCP_USER_TIMEOUT, 20_000))


def serve(address: str, port: int = PORT) -> None:
    """Answers for ever. The commands have this process's environment, and go on when whoever asked is gone."""
    with socket.create_server((address, port)) as server:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection, connection.makefile("r", encoding="latin-1", newline="\n") as asked:
        question = json.loads(asked.readline())
        command = subprocess.Popen(
            ["sh", "-c", question["words"]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        writing, told = threading.Lock(), [("out", command.stdout), ("err", command.stderr)]

        def tell(**what: object) -> None:
            with writing:
                connection.sendall(json.dumps(what).encode() + b"\n")

        def pass_on(name: str, stream: IO[bytes]) -> None:
            while text := stream.read1():
                tell(to=name, text=text.decode("latin-1"))

        threads = [threading.Thread(target=pass_on, args=pair) for pair in told]
        for thread in threads:
            thread.start()
        try:
            command.stdin.write(question["stdin"].encode("latin-1"))
            command.stdin.close()
        except BrokenPipeError:  # it did not want all of it
            pass
        for thread in threads:
            thread.join()
        tell(status=command.wait())


def ask(address: str, words: str, stdin: bytes, *, port: int = PORT) -> int:
    """Status of the command, whose output comes here as it is written; LOST with a line where there is no way to the node."""
    try:
        with socket.create_connection((address, port), CONNECT_SECONDS) as connection:
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _ALIVE:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
            connection.sendall(json.dumps({"words": words, "stdin": stdin.decode("latin-1")}).encode() + b"\n")
            with connection.makefile("r", encoding="latin-1", newline="\n") as answers:
                for line in answers:
                    answer = json.loads(line)
                    if "status" in answer:
                        status = answer["status"]
                        return status if status >= 0 else 128 - status
                    stream = {"out": sys.stdout, "err": sys.stderr}[answer["to"]].buffer
                    stream.write(answer["text"].encode("latin-1"))
                    stream.flush()
        why = "it hung up"
    except OSError as error:
        why = str(error)
    sys.stderr.write(f"{address}: {why}\n")
    return LOST


def main(argv: list[str]) -> int:
    verb, address, *rest = argv
    if verb == "serve":
        serve(address, *map(int, rest))
    return ask(address, " ".join(rest), sys.stdin.buffer.read())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
