"""Freed activations stay with the process: layers after the first cause no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_COUNT_FAULTS = """
import resource
import torch
from deebert.memory import keep_freed_memory

torch.set_num_threads(1)
if {keep}:
    assert keep_freed_memory()
x = torch.ones(2048, 1536)

def layer():
    a = x * 2
    b = a + 1
    return b * a

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        layer()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 8

print(*(faults() for _ in range(6)))
"""


def faults_per_layer(*, keep: bool) -> list[float]:
    """Of six rounds."""
    code = _COUNT_FAULTS.format(keep=keep)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_layers_reuse_the_pages_of_the_layers_before() -> None:
    # 36 MiB of activations, in blocks of 12: hundreds of pages, at least, come and go by default.
    assert max(faults_per_layer(keep=False)) > 200
    # The least: a kernel that reclaims idle pages while the process waits makes faults of its own.
    assert min(faults_per_layer(keep=True)) < 50
