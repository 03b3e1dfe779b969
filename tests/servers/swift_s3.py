"""OpenStack Swift as a real S3 server on loopback: account, container, object and proxy server in one process.

Run as `python -m tests.servers.swift_s3 DATA_DIR PORT ACCESS SECRET`, where ACCESS is `account:user` and port 0
picks a free one. It prints its address when it answers, and ends with its parent. The data folder must lie on a
file system with user extended attributes, where Swift keeps what it knows of an object.

Nothing here is durable or replicated: rings of one device, no fsync, no authentication between the parts, which
are on ports of loopback of their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.servers.lifetime import MISSING, end_with_parent, launched

STORES = ("account", "container", "object")
DEVICE = "disk"
PIPELINE = ("catch_errors", "gatekeeper", "listing_formats", "s3api", "tempauth", "slo", "dlo", "proxy-server")
BLOCK_BYTES = str(1024 * 1024)


@contextmanager
def running(data: Path, access: str, secret: str) -> Iterator[str]:
    """Run a server for the block and yield its address.

    Raises:
        ServerMissing: Swift is not installed, or the folder's file system keeps no extended attributes.
    """
    with launched("tests.servers.swift_s3", str(data), "0", access, secret) as address:
        yield address


def _ini(sections: dict[str, dict[str, str]]) -> str:
    blocks = []
    for name, options in sections.items():
        blocks.append("\n".join([f"[{name}]", *(f"{key} = {value}" for key, value in options.items())]))
    return "\n\n".join(blocks) + "\n"


def _defaults(data: Path) -> dict[str, str]:
    # log_address: a file that is not there, or Swift would write to the machine's syslog.
    return {
        "swift_dir": str(data),
        "devices": str(data / "devices"),
        "mount_check": "false",
        "log_address": "/nonexistent",
    }


def _store_config(data: Path, name: str) -> str:
    app = {"use": f"egg:swift#{name}"}
    if name == "object":
        app |= {"disk_chunk_size": BLOCK_BYTES, "network_chunk_size": BLOCK_BYTES, "fsync_on_close": "false"}
    return _ini({"DEFAULT": _defaults(data), "pipeline:main": {"pipeline": name}, f"app:{name}": app})


def _proxy_config(data: Path, access: str, secret: str) -> str:
    account, user = access.split(":")
    sections = {"DEFAULT": _defaults(data), "pipeline:main": {"pipeline": " ".join(PIPELINE)}}
    for name in PIPELINE[:-1]:
        sections[f"filter:{name}"] = {"use": f"egg:swift#{name}"}
    sections["filter:tempauth"][f"user_{account}_{user}"] = f"{secret} .admin"
    sections["filter:s3api"] |= {"location": "us-east-1", "check_bucket_owner": "false"}
    sections["app:proxy-server"] = {
        "use": "egg:swift#proxy",
        "account_autocreate": "true",
        "client_chunk_size": BLOCK_BYTES,
        "object_chunk_size": BLOCK_BYTES,
    }
    return _ini(sections)


def _prepare(data: Path) -> None:
    """Make the folders, and Swift's configuration of the whole, which it reads while it is imported."""
    (data / "devices" / DEVICE).mkdir(parents=True, exist_ok=True)
    try:
        os.setxattr(data / "devices", "user.modelyard", b"1")
    except OSError as error:
        sys.stderr.write(f"The file system of {data} keeps no user extended attributes: {error.strerror}.\n")
        raise SystemExit(MISSING) from None
    whole = {"swift-hash": {"swift_hash_path_suffix": "modelyard"}, "swift-constraints": {"max_header_size": "32768"}}
    (data / "swift.conf").write_text(_ini(whole), "utf-8")


def main(data: Path, port: int, access: str, secret: str) -> None:
    """Serve until the process is ended."""
    end_with_parent()
    try:
        import eventlet
    except ImportError:
        sys.stderr.write("Swift is not installed: install the package swift.\n")
        raise SystemExit(MISSING) from None
    eventlet.monkey_patch(thread=False)
    data = data.absolute()
    _prepare(data)

    import logging

    from eventlet import wsgi
    from swift.common import constraints, storage_policy, utils

    utils.SWIFT_CONF_FILE = str(data / "swift.conf")
    utils.HASH_PATH_SUFFIX = b"modelyard"
    constraints.reload_constraints()
    storage_policy.reload_storage_policies()

    from swift.common.http_protocol import SwiftHttpProtocol
    from swift.common.ring import RingBuilder
    from swift.common.wsgi import loadapp

    quiet = logging.getLogger("swift-requests")
    quiet.setLevel(logging.ERROR)
    sockets: dict[str, Any] = {}
    for name in STORES:
        sockets[name] = eventlet.listen(("127.0.0.1", 0))
        ring = RingBuilder(2, 1, 0)
        device = {"id": 0, "region": 1, "zone": 1, "ip": "127.0.0.1", "device": DEVICE, "weight": 1}
        ring.add_dev({**device, "port": sockets[name].getsockname()[1]})
        ring.rebalance()
        ring.get_ring().save(str(data / f"{name}.ring.gz"))
        (data / f"{name}.conf").write_text(_store_config(data, name), "utf-8")
    sockets["proxy"] = eventlet.listen(("127.0.0.1", port))
    (data / "proxy.conf").write_text(_proxy_config(data, access, secret), "utf-8")

    threads = []
    for name, socket in sockets.items():
        app = loadapp(str(data / f"{name}.conf"), {"log_level": "ERROR"})
        # Clients of the S3 API see headers as they were written; eventlet would capitalise them.
        options = {"capitalize_response_headers": False} if name == "proxy" else {}
        threads.append(eventlet.spawn(wsgi.server, socket, app, quiet, protocol=SwiftHttpProtocol, **options))
    sys.stdout.write(f"http://127.0.0.1:{sockets['proxy'].getsockname()[1]}\n")
    sys.stdout.flush()
    for thread in threads:
        thread.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
