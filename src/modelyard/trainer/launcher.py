"""Starts the processes of one training: `accelerate launch`, whose meeting place is on loopback and nowhere else.

torch's store, by which the processes find one another, would listen on every interface of the machine, and takes what
anybody writes into it: whoever reached it could disturb the training, or steer it. It is given a socket of ours.
"""

from __future__ import annotations

import socket
from typing import Any

LOOPBACK = "127.0.0.1"


def main() -> None:
    """Do as `accelerate launch` does, with its arguments."""
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.rendezvous import static_tcp_rendezvous

    static_tcp_rendezvous.TCPStore = _store_on_loopback
    launch()


def _store_on_loopback(host: str, port: int, world_size: int, is_master: bool, timeout: Any, multi_tenant: bool) -> Any:
    from torch.distributed import TCPStore

    if not is_master or host != LOOPBACK:
        raise RuntimeError(f"all processes of a training are on this machine, and not at {host}:{port}")
    listener = socket.create_server((LOOPBACK, port))
    # The store closes it.
    return TCPStore(
        LOOPBACK, port, world_size, True, timeout, multi_tenant=multi_tenant, master_listen_fd=listener.detach()
    )


if __name__ == "__main__":
    main()
