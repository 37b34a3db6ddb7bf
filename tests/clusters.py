"""Ray nodes as real processes on loopback, each ended with all that it started and nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import requests

START_SECONDS = 300.0
STOP_SECONDS = 5.0
POLL_SECONDS = 0.2


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(holds: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(POLL_SECONDS)


class Node:
    """A `ray start --block` process and its children, in a process group of their own."""

    def __init__(self, *words: str, cpus: int) -> None:
        # Unix sockets have short paths, and pytest's folders are long.
        self.temp_dir = Path(tempfile.mkdtemp(prefix="dbj-", dir="/tmp"))
        command = [
            *(str(Path(sys.executable).parent / "ray"), "start", "--block", f"--num-cpus={cpus}"),
            *("--node-ip-address=127.0.0.1", "--disable-usage-stats", "--num-gpus=0"),
            *("--object-store-memory=200000000", *words),
        ]
        if "--head" in words:
            command.append(f"--temp-dir={self.temp_dir}")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    @property
    def log(self) -> Path:
        return self.temp_dir / "start.log"

    def assert_alive(self) -> None:
        assert self._process.poll() is None, self.log.read_text()

    def kill(self) -> None:
        """As when the machine loses power."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session is its process group
        self._process.wait()

    def stop(self) -> None:
        """End it tidily, if it can be."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self.kill()
        shutil.rmtree(self.temp_dir, ignore_errors=True)


class Head(Node):
    """The first node of a cluster, with its job API."""

    def __init__(self, *, cpus: int) -> None:
        port, dashboard_port, agent_port, metrics_port = free_ports(4)
        self.address = f"127.0.0.1:{port}"
        self.jobs_address = f"http://127.0.0.1:{dashboard_port}"
        self.metrics_address = f"http://127.0.0.1:{metrics_port}/metrics"
        super().__init__(
            *("--head", f"--port={port}", f"--dashboard-agent-listen-port={agent_port}"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
            f"--metrics-export-port={metrics_port}",
            cpus=cpus,
        )
        wait_for(self._answers, START_SECONDS, "the head node does not answer")

    def _answers(self) -> bool:
        self.assert_alive()
        try:
            return requests.get(f"{self.jobs_address}/api/jobs/", timeout=5).ok
        except requests.RequestException:
            return False

    def add_node(self, *, cpus: int) -> Node:
        """Another node, on the same machine, that has joined."""
        (agent_port,) = free_ports(1)
        before = self.alive_nodes()
        node = Node(f"--address={self.address}", f"--dashboard-agent-listen-port={agent_port}", cpus=cpus)

        def has_joined() -> bool:
            node.assert_alive()
            return self.alive_nodes() > before

        wait_for(has_joined, START_SECONDS, "the node does not join")
        return node

    def alive_nodes(self) -> int:
        answer = requests.get(f"{self.jobs_address}/api/v0/nodes", timeout=10).json()
        return sum(node["state"] == "ALIVE" for node in answer["data"]["result"]["result"])
