"""Every line that a runner is known to fail with has advice of its own."""

import pytest

from sdconvert.android.device_log import explain_log


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("write: No space left on device", "storage is full"),
        ("[ERROR] DspTransport.openSession qnn_open failed, 0x80000406, prio 100", "Skel of this phone's architecture"),
        ("Unable to load Skel Library. transportStatus: 9", "Skel of this phone's architecture"),
        ("Failed to create transport for device, error: 1008", "Skel of this phone's architecture"),
        ("Failed to load skel, error: 1002\nTransport layer setup failed: 14001", "Skel of this phone's architecture"),
        ("Skel lib id mismatch: expected (v2.46) detected (v2.47)", "Skel of this phone's architecture"),
        ("Transport layer setup failed: 14001", "use a newer SDK"),
        ("No Snapdragon SOC detected", "use a newer SDK"),
        ("Failed to load skel, error: 4000", "use a newer SDK"),
        ("fastrpc open failed with 0x80000416", "no unsigned PD"),
        ("QnnDsp error 1003", "no unsigned PD"),
        ("Could not create context from binary, err 5005", "DSP's memory is too small"),
        ("Could not create context from binary, err 5000", "older than the compiler"),
        ("Unsupported context binary version 3.2.0", "older than the compiler"),
        ("Graph finalize failed with err 1002", "memory could not be allocated"),
        ('CANNOT LINK EXECUTABLE "./bin/qnn-net-run": library "libc.so.6" not found', "a library is missing"),
        ("./bin/qnn-net-run: not executable: 64-bit ELF file", "a library is missing"),
        ("everything is fine", ""),
    ],
)
def test_what_a_log_says_in_numbers(line: str, advice: str) -> None:
    found = explain_log(f"before\n{line}\nafter")
    assert advice in found
    assert bool(found) == bool(advice)
