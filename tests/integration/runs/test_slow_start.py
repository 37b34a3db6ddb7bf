"""A machine so busy that Ray's own processes do not start in the half minute that Ray gives them."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.conftest import REPOSITORY

# Ray's clock runs fast while it waits for its first node, which nobody sees register.
RUN = """
import json, logging, sys, time
import psutil, ray
from ray._private import node, services
from deebert.errors import DeeBertError
from pipeline.cluster import RaySession

class FastTime:
    def __getattr__(self, name):
        return getattr(time, name)
    def monotonic(self):
        return 100 * time.monotonic()

late, seen, get_node = int(sys.argv[1]), set(), services.get_node
def registers_late(address, node_id):
    seen.add(node_id)
    if len(seen) <= late:
        raise RuntimeError("not registered")
    node.time = time
    return get_node(address, node_id)

logging.basicConfig(format="%(message)s", level=logging.WARNING)
node.time, services.get_node = FastTime(), registers_late
try:
    with RaySession() as session:
        session.start()
        print(json.dumps({"answer": ray.get(ray.remote(lambda: 42).remote())}))
        started = [p.name() for p in psutil.Process().children(recursive=True)]
        print(json.dumps({"servers": started.count("gcs_server")}))
except DeeBertError as error:
    started = [p.name() for p in psutil.Process().children(recursive=True) if p.is_running()]
    print(json.dumps({"error": str(error), "servers": started.count("gcs_server")}))
"""


def start(late: int) -> tuple[list[dict[str, object]], str]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(late)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_it_is_tried_again_and_nothing_of_the_first_try_is_left() -> None:
    said, log = start(1)

    assert said == [{"answer": 42}, {"servers": 1}]
    assert log.count("Ray did not start within half a minute on this busy machine: trying again") == 1


def test_a_machine_on_which_it_never_starts_is_named() -> None:
    said, log = start(99)

    assert said == [
        {
            "error": "Ray did not start on this machine in 4 times half a minute: start again when less else runs "
            "here, or give --ray-address",
            "servers": 0,
        }
    ]
    assert log.count("trying again") == 3
