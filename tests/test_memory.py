"""The peak is that of the stretch that was measured, and what is freed counts no more."""

import platform
import subprocess
import sys

import pytest

from sdconvert.memory import PeakMemory

MIB = 1 << 20


def test_peak_follows_what_is_touched_and_forgets_what_was_before() -> None:
    before = PeakMemory()
    block = bytearray(b"x" * (200 * MIB))
    high = before.peak_bytes()
    del block
    assert high > 200 * MIB
    assert PeakMemory().peak_bytes() < high - 100 * MIB


def test_a_child_counts() -> None:
    # In a process of its own: pytest may have had larger children before.
    code = f"""
import subprocess, sys
from sdconvert.memory import PeakMemory
memory = PeakMemory()
subprocess.run([sys.executable, "-c", "x = b'x' * {300 * MIB}"], check=True)
print(memory.peak_bytes())
"""
    finished = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 300 * MIB < int(finished.stdout) < 500 * MIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heap")
@pytest.mark.parametrize(("context", "mib"), [("freed_at_once", 160), ("nullcontext", 320)])
@pytest.mark.parametrize("holes", [False, True])
def test_blocks_between_others_go_back_to_the_system(context: str, mib: int, holes: bool) -> None:
    code = f"""
from contextlib import nullcontext
from pathlib import Path
from sdconvert.memory import freed_at_once, return_freed_memory

def own_mib():
    return int(next(line.split()[1] for line in Path("/proc/self/status").open() if line.startswith("RssAnon"))) >> 10

def make():
    return bytearray(8 << 20)

def free_one():
    bytearray(31 << 20)  # from here on glibc has blocks of this size on its heap

if {holes}:
    free_one()
    pairs = [(make(), bytes(1 << 16)) for _ in range(40)]
    between = [small for _, small in pairs]
    del pairs
    return_freed_memory()
with {context}():
    before = own_mib()
    free_one()
    blocks = [make() for _ in range(40)]
    kept = blocks[::2]
    del blocks
    print(own_mib() - before)
"""
    finished = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(finished.stdout) == pytest.approx(mib, abs=40)
