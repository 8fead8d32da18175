"""Profiles are read by the names of their rows, and cycles are told as cycles."""

import re
from pathlib import Path

import pytest

from sdconvert.android.profile import EXECUTE, Profile
from sdconvert.errors import DeviceError

HEADER = "Msg Timestamp,Message,Time,Unit of Measurement,Timing Source,Event Level,Event Identifier"
# As ONNX Runtime 1.31 with QAIRT 2.51 writes it for a Conv and a SiLU; the second inference is faster.
DETAILED = """
0,BACKEND,3572,US,BACKEND,ROOT,Accelerator (load binary) time
0,INIT,21388,US,BACKEND,ROOT,QNN (load binary) time
0,BACKEND,4,COUNT,BACKEND,ROOT,Number of HVX threads used
0,BACKEND,300,US,BACKEND,ROOT,Time for initial VTCM acquire
0,BACKEND,1200,CYCLES,BACKEND,ROOT,Accelerator (execute) time (cycles)
0,NODE,100,CYCLES,BACKEND,SUB-EVENT,Input OpId_2 (cycles)
0,NODE,900,CYCLES,BACKEND,SUB-EVENT,conv:1:OpId_16 (cycles)
0,NODE,200,CYCLES,BACKEND,SUB-EVENT,Sigmoid4:OpId_17 (cycles)
0,EXECUTE,1500,US,BACKEND,ROOT,QNN (execute) time
0,BACKEND,4,COUNT,BACKEND,ROOT,Number of HVX threads used
0,BACKEND,100,US,BACKEND,ROOT,Time for initial VTCM acquire
0,NODE,100,CYCLES,BACKEND,SUB-EVENT,Input OpId_2 (cycles)
0,NODE,700,CYCLES,BACKEND,SUB-EVENT,conv:1:OpId_16 (cycles)
0,NODE,200,CYCLES,BACKEND,SUB-EVENT,Sigmoid4:OpId_17 (cycles)
0,BACKEND,4096,BYTES,BACKEND,ROOT,DDR read
0,EXECUTE,1000,US,BACKEND,ROOT,QNN (execute) time
"""


def profile(folder: Path, rows: str) -> Profile:
    (folder / "p.csv").write_text(HEADER + rows)
    return Profile(folder / "p.csv")


def test_times_are_read_by_the_name_of_their_rows(tmp_path: Path) -> None:
    found = profile(tmp_path, DETAILED)
    assert (found.times_ms(EXECUTE), found.load_ms()) == ([1.5, 1.0], 21.388)
    for absent in ("conv:1:OpId_16 (cycles)", "RPC (execute) time"):
        with pytest.raises(DeviceError, match=f"has no time called `{re.escape(absent)}`"):
            found.times_ms(absent)
    assert profile(tmp_path, "\n0,EXECUTE,what,US,BACKEND,ROOT,QNN (execute) time").load_ms() is None


def test_the_npus_own_time_is_read_where_a_line_says_it(tmp_path: Path) -> None:
    assert profile(tmp_path, DETAILED).npu_ms() == []
    rows = "0,BACKEND,2886,US,BACKEND,ROOT,RPC (execute) time\n0,BACKEND,{},US,BACKEND,ROOT,{}(execute) time\n"
    whole = "".join("\n" + rows.format(time, "Accelerator ") for time in (1734, 1700))
    assert profile(tmp_path, DETAILED + whole).npu_ms() == [1.734, 1.7]
    assert profile(tmp_path, "\n" + rows.format(1600, "QNN accelerator ")).npu_ms() == [1.6]


def test_ops_are_told_in_cycles_and_shares(tmp_path: Path) -> None:
    told = profile(tmp_path, DETAILED).ops()
    assert (told["ops"], told["cycles"]) == (3, 1100)
    assert told["top"] == [
        {"op": "conv:1:OpId_16", "cycles": 800, "share": 800 / 1100},
        {"op": "Sigmoid4:OpId_17", "cycles": 200, "share": 200 / 1100},
        {"op": "Input OpId_2", "cycles": 100, "share": 100 / 1100},
    ]
    assert told["counters"] == {"Number of HVX threads used": 4, "DDR read": 4096}
    assert told["stages_ms"]["Time for initial VTCM acquire"] == pytest.approx(0.2)


def test_no_more_than_twenty_ops_are_told(tmp_path: Path) -> None:
    rows = "".join(f"\n0,NODE,{100 + i},CYCLES,BACKEND,SUB-EVENT,op{i}:OpId_{i} (cycles)" for i in range(30))
    told = profile(tmp_path, rows).ops()
    assert (told["ops"], len(told["top"]), told["top"][0]["op"]) == (30, 20, "op29:OpId_29")


def test_a_profile_without_ops_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"profile `p\.csv` has no cycles of ops"):
        profile(tmp_path, "\n0,EXECUTE,1500,US,BACKEND,ROOT,QNN (execute) time").ops()
