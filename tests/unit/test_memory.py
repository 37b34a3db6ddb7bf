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


# What a thread's memory comes in, 64 MiB, with too little left for the next block: that one has the next piece alone.
_COUNT_FAULTS_OF_A_THREAD = """
import ctypes, resource, threading
from deebert.memory import keep_freed_memory

assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def filled(mebibytes):
    block = libc.malloc(mebibytes << 20)
    ctypes.memset(block, 1, mebibytes << 20)
    return block

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    libc.free(filled(25))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def rounds():
    held = filled(20), filled(20)
    print(*(faults() for _ in range(6)))

thread = threading.Thread(target=rounds)
thread.start()
thread.join()
"""


def faults_of(code: str) -> list[float]:
    """That a process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def test_layers_reuse_the_pages_of_the_layers_before() -> None:
    # 36 MiB of activations, in blocks of 12: hundreds of pages, at least, come and go by default.
    assert max(faults_of(_COUNT_FAULTS.format(keep=False))) > 200
    # The least: a kernel that reclaims idle pages while the process waits makes faults of its own.
    assert min(faults_of(_COUNT_FAULTS.format(keep=True))) < 50


def test_so_do_those_of_a_thread() -> None:
    assert min(faults_of(_COUNT_FAULTS_OF_A_THREAD)) < 50
