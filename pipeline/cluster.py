"""The Ray that a run works on: an existing cluster, or one of its own on this machine.

Knows nothing of shards or models.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray._private import ray_constants
from ray._private.node import Node

from pipeline.config import Replicas
from pipeline.errors import UsageError

log = logging.getLogger(__name__)

# Unix sockets have paths of at most 107 bytes, and Ray's are long below its temporary folder.
_LONGEST_TEMP_DIR = 40
_TEMP_PREFIX = "deebert-ray-"
_CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_LOGS_PREFIX = "deebert-logs-"
_KNOCK_SECONDS = 10.0
_STARTS, _GAVE_UP = 4, "timed out during startup"
# The stragglers of several shards share the deep layers' micro-batches, and while one is written the next is read.
_SHARDS_IN_FLIGHT = 4
# A GPU's layer buffers hold many times the tokens, and it is done with a shard in a fraction of what reading and
# committing one takes.
_SHARDS_IN_FLIGHT_ON_GPU = 16
# A replica's process before its model: Python, Ray and torch, and room for micro-batches.
_PROCESS_BYTES = 1 << 30
_MEMORY_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What there is to place replicas on."""

    cores: int
    """0 where no node that has any has started yet."""
    cores_of_largest_node: int
    """What one replica can reserve at most: it runs on one node."""
    gpus: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How many replicas, on what."""

    replicas: Replicas
    device: str
    """``cuda`` or ``cpu``."""
    threads: int
    """CPU threads per replica."""
    num_cpus: float
    """Cores that a replica reserves."""

    @property
    def num_gpus(self) -> int:
        """GPUs that a replica reserves."""
        return 1 if self.device == "cuda" else 0

    @property
    def shards_in_flight(self) -> int:
        """Shards that a replica has in hand at a time."""
        return _SHARDS_IN_FLIGHT_ON_GPU if self.num_gpus else _SHARDS_IN_FLIGHT


def place(
    there_is: Resources,
    *,
    on_gpus: bool,
    replicas: Replicas | None,
    threads: int | None,
    weight_bytes: int,
    shards: int | None = None,
) -> Placement:
    """Decide what the caller leaves open: a replica per GPU, else one per core as far as memory goes.

    On CPUs, replicas of one thread beat one replica of many: threads wait for each other in every product,
    replicas never. No more replicas than shards: the others would start for nothing, and keep their cores idle.

    Args:
        there_is: the resources.
        on_gpus: whether replicas run on GPUs.
        replicas: how many, None to decide.
        threads: CPU threads per replica, None to decide.
        weight_bytes: size of the model in float32.
        shards: how many there are to do, None for enough.
    """
    room = int(_MEMORY_SHARE * there_is.memory_bytes // (_PROCESS_BYTES + 2 * weight_bytes))
    most = max(1, there_is.gpus if on_gpus else min(there_is.cores, room))
    asked = replicas or Replicas(most, most)
    enough = asked.most if shards is None else max(1, shards)
    working = Replicas(min(asked.least, enough), min(asked.most, enough))

    def threads_each(of: Replicas) -> int:
        return threads or max(1, min(there_is.cores // of.most, there_is.cores_of_largest_node))

    if on_gpus and not there_is.gpus:
        log.warning("the cluster has no GPU yet: waiting for one")
    if not on_gpus and not there_is.cores:
        log.warning("the cluster has no core yet: waiting for one")
    return Placement(
        replicas=working,
        device="cuda" if on_gpus else "cpu",
        threads=threads_each(working),
        # Those that few shards leave to each are used where they are free: a run of one shard must not wait for all.
        num_cpus=1.0 if on_gpus else _reserved(there_is, asked, threads_each(asked)),
    )


def _reserved(there_is: Resources, replicas: Replicas, threads: int) -> float:
    """Cores that a replica reserves, of which it uses `threads`."""
    if not there_is.cores:
        return threads
    # More replicas or threads than cores are the caller's wish: Ray must not wait for cores that never come. Those
    # beyond the least are to come with the cores: a cluster grows only for what does not fit.
    return min(threads, there_is.cores / replicas.least, there_is.cores_of_largest_node)


class RaySession:
    """Connects or starts Ray when first needed, and stops what it started."""

    def __init__(self, address: str | None = None) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._temp_dir: str | None = None
        self._mine = False
        self._keeps_logs = False
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        # An existing cluster says before anything is planned whether there are GPUs; a local Ray, which
        # takes seconds to start, waits until there is work to do.
        if self._address and not ray.is_initialized():
            self._connect(self._address)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine:
            ray.shutdown()
        self._exits.close()
        if self._temp_dir is not None:
            if self._keeps_logs or (kind is not None and issubclass(kind, Exception)):
                _save_logs(Path(self._temp_dir))
            shutil.rmtree(self._temp_dir, ignore_errors=True)

    def keep_logs(self) -> None:
        """Keep a local Ray's logs, whatever the end: there is something to read in them; say where a cluster's are."""
        self._keeps_logs = True
        if self._temp_dir is None:
            log.warning("the replicas' logs are on their nodes, until these go: see `ray logs cluster`")

    def start(self) -> None:
        """Make sure that Ray runs."""
        if ray.is_initialized():
            return
        self._temp_dir = _make_temp_dir()
        # A local Ray is nobody else's: loopback only, no dashboard, and no token left in the home folder.
        if "RAY_AUTH_MODE" not in os.environ:
            self._exits.enter_context(_set_to("RAY_AUTH_MODE", "disabled"))
        with _loopback_only():
            _init_patiently(address="local", include_dashboard=False, _temp_dir=self._temp_dir)
        self._mine = True

    def uses_gpus(self, device: str) -> bool:
        """Whether replicas run on GPUs: ``auto`` asks the cluster, ``cpu`` and ``cuda`` are orders.

        Raises:
            UsageError: ``cuda``, and Ray will be this machine's, which has no GPU; a cluster may get one.
        """
        has_gpu = device != "cpu" and self._count("GPU") > 0
        if device == "cuda" and not has_gpu and not ray.is_initialized():
            raise UsageError(
                "--device cuda, but this machine has no GPU: leave --device out, or give the --ray-address of a "
                "cluster that has one"
            )
        return device == "cuda" or has_gpu

    def resources(self) -> Resources:
        """What the cluster, or this machine, has."""
        cores = int(self._count("CPU"))
        return Resources(
            cores=cores,
            cores_of_largest_node=_cores_of_largest_node() if ray.is_initialized() else cores,
            gpus=int(self._count("GPU")),
            memory_bytes=int(self._count("memory")),
        )

    def _connect(self, address: str) -> None:
        if address.startswith("ray://"):
            raise UsageError(
                f"{address!r} is of a Ray Client, which cannot run this: submit the command with `ray job submit`, or "
                "run it on a node of the cluster with --ray-address auto"
            )
        try:
            _knock(address)
            _init(address=address)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            if reason.startswith("Version mismatch"):
                raise UsageError(
                    f"the Ray cluster {address!r} runs other versions ({reason}): use its Ray and Python"
                ) from error
            first = str(error).strip().splitlines()[0]
            raise UsageError(
                f"cannot reach the Ray cluster {address!r} ({first}): check --ray-address, or leave it out"
            ) from error
        self._mine = True

    def _count(self, resource: str) -> float:
        if ray.is_initialized():
            return float(ray.cluster_resources().get(resource, 0))
        if resource == "CPU":
            return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if resource == "memory":
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        import torch

        return torch.cuda.device_count()


def _cores_of_largest_node() -> int:
    nodes = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return max([1, *(int(resources.get("CPU", 0)) for resources in nodes)])


def _knock(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


def _init(**options: Any) -> None:
    """`ray.init`, which replaces the program's handler of SIGTERM and must not."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _init_patiently(**options: Any) -> None:
    """`_init`, again where Ray gave itself up: half a minute is all it waits for its own processes to start.

    Raises:
        UsageError: they never started in time.
    """
    for start in range(1, _STARTS + 1):
        try:
            _init(**options)
            return
        except Exception as error:  # Ray has no type for it
            if _GAVE_UP not in str(error):
                raise
            _end_half_started(error)
            if start == _STARTS:
                raise UsageError(
                    f"Ray did not start on this machine in {_STARTS} times half a minute: start again when less "
                    "else runs here, or give --ray-address"
                ) from error
            log.warning("Ray did not start within half a minute on this busy machine: trying again")


def _end_half_started(error: Exception) -> None:
    """End what a start that failed has left running; Ray itself would leave it until this process ends."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("self")
        if isinstance(node, Node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)


@contextmanager
def _loopback_only() -> Iterator[None]:
    """A Ray that starts in here listens on loopback alone: its own wish not to be a cluster.

    An address of 127.0.0.1 is not enough: Ray turns it into one that other machines reach. The variable is for
    the processes that Ray starts, the constant for this one, which has read the variable already.
    """
    constants: Any = ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        with _set_to(_CLUSTER_VARIABLE, "0"):
            yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _set_to(variable: str, value: str) -> Iterator[None]:
    """An environment variable set for a while: it is the calling program's environment."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before


def _make_temp_dir() -> str:
    """A folder for a local Ray's files, named after this process; those of dead processes are removed."""
    folder = Path(tempfile.gettempdir())
    if len(str(folder)) > _LONGEST_TEMP_DIR:
        folder = Path("/tmp")
    for leftover in folder.glob(f"{_TEMP_PREFIX}*"):
        owner = leftover.name.removeprefix(_TEMP_PREFIX).partition("-")[0]
        if owner.isdigit() and not _is_alive(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{_TEMP_PREFIX}{os.getpid()}-", dir=folder)


def _save_logs(temp_dir: Path) -> None:
    """What the replicas wrote, out of the folder that goes with Ray."""
    logs = temp_dir / "session_latest" / "logs"
    written = [path for path in logs.glob("worker-*") if path.stat().st_size]
    if not written:
        return
    folder = tempfile.mkdtemp(prefix=_LOGS_PREFIX)
    for path in written:
        shutil.copy(path, folder)
    log.warning("the replicas' logs are in %s", folder)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, and alive
        return True
    return True
