"""Joins a Ray cluster, or starts Ray here, for as long as ``ray_session`` lasts."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

from flipkd.errors import ClusterError, ConfigError
from flipkd.logs import adopt_handlers, current_options
from flipkd.run.ray_session import opened, opened_address

try:
    import ray
    import ray.exceptions
    from ray.util.client import ray as client
except ImportError as missing:
    raise ConfigError("--ray needs Ray: pip install 'flipkd[ray]'") from missing

RAY_LOGGERS = ("ray", "ray.data", "ray.train")


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Files that are made meanwhile, by this process and those that it starts (a Ray of its own), are private."""
    previous = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(previous)


def connect(address: str) -> None:
    """Joins the cluster at ``address`` (``auto``, ``HOST:PORT``, ``ray://...``) or starts Ray here (``local``).

    A connection that this process has already is used, and stays; one that is made here ends with ``ray_session``.

    Raises:
        ClusterError: there is no cluster, or it refuses this client.
        ConfigError: this process is connected to another cluster.
    """
    adopt_handlers(*RAY_LOGGERS)
    log = current_options()
    if log is not None and log.form == "json":
        os.environ.setdefault("RAY_BACKEND_LOG_JSON", "1")  # of what Ray's C++ says on stderr
    if ray.is_initialized():
        _check_same(address)
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        options["include_dashboard"] = False
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself knocks for minutes at a door that is not there
            socket.create_connection((host, int(port)), timeout=20).close()
        with private_files():
            ray.init(address=address, **options)
        opened(address, ray.shutdown)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        causes = f"{error} {error.__cause__}"
        asks = "AuthToken" in causes or "authentication token" in causes
        hint = "; it asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" if asks else ""
        raise ClusterError(f"--ray {address}: cannot join the cluster: {str(error).splitlines()[0]}{hint}") from error


def _check_same(address: str) -> None:
    """Refuses an address that is not that of the connection there is, as far as one can tell."""
    own = opened_address()
    if address in ("auto", own):
        return
    there = ray.get_runtime_context().gcs_address
    if address == "local":
        is_same = own is None
    elif address.startswith("ray://"):
        is_same = own is None and client.is_connected()
    else:
        (host, _, port), (known, _, known_port) = address.rpartition(":"), there.rpartition(":")
        is_same = port == known_port and bool(_ip_addresses(host) & {known, "127.0.0.1", "::1"})
    if not is_same:
        raise ConfigError(
            f"--ray {address}: this process is connected to the cluster {own or there} already; pass --ray auto to use "
            "that one, or end it with ray.shutdown()"
        )


def _ip_addresses(host: str) -> set[str]:
    with contextlib.suppress(OSError):
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    return {host}
