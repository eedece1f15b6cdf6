"""What a raylet starts in place of a Python that would import Ray: hands the program over to the forge."""

import json
import os
import socket
import sys

_SKIPPED = ("--serialized-runtime-env-context", "--language")


def main() -> None:
    """The arguments are those of Ray's `setup_worker.py`: options of its own, flags of Python, then the program."""
    arguments = [word for word in sys.argv[1:] if not word.startswith(_SKIPPED) and word not in ("-s", "-S")]
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as forge:
        forge.connect(os.environ["KILLS_FORGE_SOCKET"])
        data = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(forge, [data], [0, 1, 2])
        forge.sendall(data[sent:])
        forge.recv(1)  # until it has forked: then this process may end


main()
