"""The peak is that of the stretch that was measured."""

import subprocess
import sys

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
