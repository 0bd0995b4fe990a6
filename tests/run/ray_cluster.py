"""A real Ray cluster on this machine: ``ray start`` nodes, the head without CPUs, as in ``cluster.yaml``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
ROOT = str(Path(__file__).parents[2])
# Workers import tests.run.faults; the nodes trust only who holds the token, as in cluster.yaml.
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": ROOT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """Nodes of a Ray cluster on this machine; each is the process group of a ``ray start --block``."""

    address: str
    folder: Path
    nodes: list[subprocess.Popen[bytes]]

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        command = [*RAY, "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", *options]
        with open(self.folder / f"node-{len(self.nodes)}.log", "wb") as log:
            node = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=ENVIRONMENT)
        self.nodes.append(node)
        return node

    def add_worker(self) -> subprocess.Popen[bytes]:
        return self.start(f"--address={self.address}", "--num-cpus=1", "--object-store-memory=100000000")

    def processes(self, node: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """The node's raylet, workers and agents: all that it started."""
        root = psutil.Process(node.pid)
        return [root, *root.children(recursive=True)]

    def unit_workers(self) -> list[psutil.Process]:
        """The processes that run units now."""
        found = []
        for node in self.nodes[1:]:
            if node.poll() is not None:
                continue
            for process in self.processes(node):
                with contextlib.suppress(psutil.Error):
                    if any("MapWorker" in part for part in process.cmdline()):
                        found.append(process)
        return found

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """SIGKILL to every process of the node, as when its machine loses power."""
        for process in self.processes(node):
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        node.wait()


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A head without CPUs and two nodes of one CPU each."""
    port = free_port()
    made = Cluster(f"127.0.0.1:{port}", folder, [])
    try:
        made.start(
            "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", "--object-store-memory=100000000"
        )
        for count in (1, 2):  # one after the other: nodes on one machine choose their ports as they start
            made.add_worker()
            wait_until(lambda count=count: alive_workers(made.address) == count, 120)  # type: ignore[misc]
        yield made
    finally:
        for node in made.nodes:
            if node.poll() is None:
                made.kill(node)


def alive_workers(address: str) -> int:
    """CPUs that the cluster has."""
    code = (
        "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False);"
        "print(int(ray.cluster_resources().get('CPU', 0)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, address], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    return int(done.stdout.strip() or 0) if done.returncode == 0 else 0


def worker_log(folder: Path) -> list[dict[str, Any]]:
    """What workers have said on stderr, in a folder where Ray keeps its sessions; each line is a JSON object.

    Ray puts it into ``session_*/logs/worker-*.err`` of the worker's node, among lines of its own such as
    ``:job_id:01000000``; the driver does not print it.
    """
    files = sorted(folder.rglob("session_*/logs/worker-*.err"))
    lines = [line for path in files for line in path.read_text().splitlines()]
    # The last one is what the autoscaler of Ray Data prints in a worker of its own.
    rays_own = r":(job_id|actor_name|task_name):.*|Requesting resources: .*"
    found = [json.loads(line) for line in lines if not re.fullmatch(rays_own, line)]
    for one in found:
        assert {"time", "level", "logger", "message", "process"} <= set(one)
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)
