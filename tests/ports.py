"""Ports that another process can listen on later."""

import random
import socket

RANGE = range(20_000, 32_000)
"""Below the ports that Linux gives to clients: one of those may be taken before the process listens, seconds later."""


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens."""
    for port in random.SystemRandom().sample(RANGE, 100):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError(f"100 random ports of {RANGE} are all in use")
