"""The command line from outside: its streams and its exit codes, in a real process where that is what counts."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from short_road import load_short_road

from sdconvert.cli import road
from sdconvert.cli.app import _globals_first, main
from sdconvert.cli.road import ROAD, load_road
from sdconvert.config import Recipe
from sdconvert.io.tensors import load_tensors, save_tensors

ROOT = Path(__file__).parents[2]
Finished = subprocess.CompletedProcess[str]
Call = Callable[..., Finished]


def process(*arguments: str, harness: bool = False) -> Finished:
    """Run sdconvert; with the harness, on a road of small stages in the place of the real ones."""
    start = [str(Path(__file__).with_name("short_road.py"))] if harness else ["-m", "sdconvert"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=ROOT,
        env=os.environ | {"NO_COLOR": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """As `process`, in this one: starting Python and importing what a command needs takes longer than the command."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def run(*arguments: str, harness: bool = False) -> Finished:
        with monkeypatch.context() as changed, pytest.raises(SystemExit) as left:
            if harness:
                changed.setattr(road, "load_road", load_short_road)
            main(list(arguments))
        written = capsys.readouterr()
        return Finished(arguments, int(str(left.value.code)), written.out, written.err)

    return run


@pytest.fixture
def build(tmp_path: Path) -> str:
    return str(tmp_path / "build")


def convert(run: Call, build: str, *arguments: str) -> Finished:
    return run("convert", "--build", build, *arguments, harness=True)


def test_light_commands_import_nothing_heavy() -> None:
    heavy = ["torch", "numpy", "diffusers", "onnx", "onnxruntime", "aimet_torch"]
    commands = [["--help"], ["convert", "--help"], ["config", "show"], ["--version"], ["plan"]]
    code = f"""
import contextlib, io, sys
import sdconvert.stages
from sdconvert.cli.app import main
sdconvert.stages.source_hash = lambda path: ""  # it parses the whole package, once per stage
for command in {commands}:
    with contextlib.redirect_stdout(io.StringIO()) as written:
        try:
            main(command)
        except SystemExit as left:
            status = left.code
    print(status, bool(written.getvalue()), [name for name in {heavy} if name in sys.modules])
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert finished.stdout == "0 True []\n" * len(commands)
    assert finished.stderr == ""


def test_weights_alone_are_split_without_torch(tmp_path: Path) -> None:
    weights = {f"attn1.{name}.weight": torch.zeros(4, 4) for name in ("to_q", "to_k", "to_v")}
    save_tensors(weights | {"attn1.to_out.0.weight": torch.zeros(4, 4)}, tmp_path / "x.safetensors")
    arguments = ["mha2sha", str(tmp_path / "x.safetensors"), "-o", str(tmp_path / "sha"), "--num-heads", "2"]
    code = f"""
import atexit, sys
from sdconvert.cli.app import main
atexit.register(lambda: print([name for name in ("torch", "numpy", "onnx") if name in sys.modules], file=sys.stderr))
main({arguments})
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert finished.stderr == "[]\n"
    assert (tmp_path / "sha" / "heads.json").is_file()


def test_the_road_is_known_without_torch() -> None:
    # A run that reuses every stage takes seconds only because of this: what computes is imported inside `run`.
    code = """
import sys
from sdconvert.cli.road import load_road
from sdconvert.config import Recipe
for stage in load_road():
    stage.settings(Recipe())
    stage.inputs(Recipe())
    print([name for name in ("torch", "numpy", "diffusers", "onnx") if name in sys.modules], stage.name)
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert finished.stdout.splitlines() == [f"[] {name}" for name in ROAD]


def test_no_arguments_is_help() -> None:
    assert process().stdout == process("--help").stdout != ""


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["convrt"], "No such command 'convrt'", "--help"),
        (["convert", "--sett", "a=b"], "No such option: --sett", "--help"),
        (["convert", "pasd_tyni"], "no recipe is called `pasd_tyni`", "did you mean `pasd_tiny`?"),
        (["convert", "--set", "qnn.soc=a"], "unknown key `qnn.soc`", "did you mean `socs`?"),
        (["convert", "--to", "quantise"], "no stage is called `quantise`", "did you mean `quantize`?"),
        (["inspect", "no/such/file"], "`no/such/file` does not exist", "check the path"),
        (["--progress", "loud", "doctor"], "--progress", "--help"),
    ],
)
def test_wrong_requests_exit_with_2_a_message_and_a_hint(
    call: Call, arguments: list[str], message: str, hint: str
) -> None:
    finished = call(*arguments)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("error: ")
    assert message in finished.stderr
    assert f"\n\nhint: {hint}" in finished.stderr or hint in finished.stderr.split("\n\nhint: ")[1]


def test_errors_are_json_for_who_asked_for_json() -> None:
    finished = process("convert", "none.yaml", "--json")
    error = json.loads(finished.stdout)["error"]
    assert (error["exit_code"], finished.returncode) == (2, 2)
    assert "none.yaml" in error["message"]
    assert error["hint"]


def test_a_plan_is_what_the_run_then_does(call: Call, build: str) -> None:
    planned = call("plan", "--build", build, harness=True)
    assert planned.returncode == 0, planned.stderr
    lines = [line.split() for line in planned.stdout.splitlines() if line.strip()[:2].isdigit()]
    assert lines == [[name, "run", "no", "result", "yet"] for name in ROAD]
    assert not Path(build).exists()
    convert(call, build, "--to", "export")
    again = call("plan", "--build", build, "--soc", "SM8750", "--json", harness=True)
    stages = {stage["stage"]: stage for stage in json.loads(again.stdout)["stages"]}
    assert [stage["state"] for stage in stages.values()] == ["reuse"] * 5 + ["run"] * 3
    assert stages["50-export"]["last"]["disk_bytes"] > 0
    assert stages["60-qnn"] == {"stage": "60-qnn", "state": "run", "why": "no result yet", "last": None, "need": None}


def test_a_run_closes_with_table_report_and_next_command(call: Call, build: str) -> None:
    finished = convert(call, build, "--soc", "SM8550", "--soc", "SM8750")
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert [line.split()[:2] for line in lines if line.strip()[:2].isdigit()] == [[name, "ran"] for name in ROAD]
    assert "figure 41.2 dB (no result yet)" in finished.stdout
    assert lines[-2] == f"report: {build}/pasd_tiny/80-report/report.html"
    assert lines[-1] == f"next:   sdconvert inspect {build}/pasd_tiny/70-android/bundle"
    assert "30-quantize: a stage of the test (no result yet)" in finished.stderr
    assert "socs:\n  - SM8550\n  - SM8750\n" in Path(build, "pasd_tiny/recipe.resolved.yaml").read_text()
    again = convert(call, build)
    assert again.stdout.count("reused") == len(ROAD)


def test_stage_commands_walk_their_stretch_and_name_the_rest_of_it(call: Call, build: str) -> None:
    finished = call("quantize", "--build", build, "--set", "pipeline.prompt=a b", harness=True)
    assert re.findall(r"^ (\d\d)-", finished.stdout, re.MULTILINE) == ["10", "20", "30"]
    assert finished.stdout.endswith(
        f"next:   sdconvert convert pasd_tiny --set 'pipeline.prompt=a b' --build {build}\n"
    )


def test_json_is_one_object_and_progress_json_is_lines(call: Call, build: str) -> None:
    finished = convert(call, build, "--json", "--progress", "json")
    data = json.loads(finished.stdout)
    assert [stage["state"] for stage in data["stages"]] == ["ran"] * len(ROAD)
    assert data["stages"][0]["metrics"]["sqnr_db"] == "Infinity"
    events = [json.loads(line) for line in finished.stderr.splitlines()]
    assert [event["event"] for event in events] == ["begin", "step", "end"] * len(ROAD)
    assert events[1] == {"stage": "10-checkpoint", "event": "step", "done": 1, "total": 2, "note": "half"}


@pytest.mark.parametrize("quiet", [["-q"], pytest.param(["--progress=none"], marks=pytest.mark.slow)])
def test_quiet_runs_leave_stderr_empty(build: str, quiet: list[str]) -> None:
    finished = convert(process, build, *quiet)
    assert finished.returncode == 0
    assert finished.stderr == ""


def test_bars_work_without_a_terminal(call: Call, build: str) -> None:
    finished = convert(call, build, "--progress", "rich")
    assert finished.returncode == 0
    assert "80-report: finished" in finished.stderr


def test_a_missed_gate_exits_with_4_after_all_is_written_and_again_when_reused(call: Call, build: str) -> None:
    for state in ("ran", "reused"):
        finished = convert(call, build, "--set", "pipeline.prompt=bad")
        assert finished.returncode == 4
        assert finished.stdout.count(state) == len(ROAD)
        assert "error: missed: simulator 12.0 dB < 35.0 dB" in finished.stderr


def test_ctrl_c_exits_with_130_and_the_next_run_goes_on(build: str) -> None:
    finished = convert(process, build, "--set", "pipeline.prompt=interrupt")
    assert finished.returncode == 130
    assert finished.stderr.endswith("error: interrupted\n\nhint: run the same command again to go on\n")
    assert sorted(path.name for path in Path(build, "pasd_tiny").iterdir() if path.is_dir()) == list(ROAD)[:2]
    assert convert(process, build).returncode == 0


def test_a_defect_is_one_line_and_a_traceback_only_on_request(build: str) -> None:
    finished = convert(process, build, "--set", "pipeline.prompt=defect", "-q")
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: unexpected ZeroDivisionError: by zero\n\nhint: ")
    assert "Traceback" in convert(process, build, "--set", "pipeline.prompt=defect", "-v").stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m sdconvert config schema | head -c 1"
    finished = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (finished.stdout, finished.stderr) == ("{", "")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("convert --json -v a", "--json -v convert a"),
        ("convert --progress json a --progress=none", "--progress json --progress=none convert a"),
        ("convert -- --json", "convert -- --json"),
        ("convert --progress", "--progress convert"),
    ],
)
def test_global_options_may_stand_anywhere(given: str, expected: str) -> None:
    assert _globals_first(given.split()) == expected.split()


def test_config_show_is_a_recipe_again(call: Call, tmp_path: Path) -> None:
    shown = call("config", "show", "--set", "name=mine")
    (tmp_path / "mine.yaml").write_text(shown.stdout)
    assert json.loads(call("config", "show", str(tmp_path / "mine.yaml"), "--json").stdout)["name"] == "mine"
    valid: Any = json.loads(call("config", "validate", str(tmp_path / "mine.yaml"), "--json").stdout)
    assert valid == {"recipe": "mine", "valid": True}
    assert json.loads(call("config", "schema").stdout)["properties"]["name"]


def test_doctor_looks_at_everything(call: Call, tmp_path: Path) -> None:
    data = json.loads(call("doctor", "--json", "--build", str(tmp_path / "new/folder")).stdout)
    names = {check["name"]: check["ok"] for check in data["checks"]}
    assert names["torch"]
    assert names["QNN libraries"]
    assert {"python", "disk", "memory"} <= names.keys()


def test_mha2sha_splits_a_folder_and_says_what_it_did(call: Call, tmp_path: Path) -> None:
    heads, width = 2, 8
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1"
    weights = {f"{layer}.to_{name}.weight": torch.rand(width, width) for name in ("q", "k", "v", "out.0")}
    save_tensors(weights | {f"{layer}.to_out.0.bias": torch.rand(width)}, tmp_path / "mha/state_dict_mha.pth")
    arguments = [str(tmp_path / "mha"), "-o", str(tmp_path / "sha"), "--num-heads", str(heads)]
    finished = call("mha2sha", *arguments, "--json")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["heads"] == heads
    split = load_tensors(tmp_path / "sha/state_dict_sha.pth")
    assert torch.equal(split[f"{layer}.to_q_convs.1.weight"].flatten(1), weights[f"{layer}.to_q.weight"][4:])
    wrong = call("mha2sha", *arguments[:-1], "3")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")


def test_every_stage_on_the_road_fits_the_protocol() -> None:
    stages = load_road()
    assert [stage.name for stage in stages] == list(ROAD)
    recipe = Recipe()
    for position, stage in enumerate(stages):
        assert set(stage.after) <= set(list(ROAD)[:position])
        assert stage.title
        assert stage.schema_version >= 1
        assert [package for package in stage.packages if not version(package)] == []
        assert json.loads(json.dumps(stage.settings(recipe))) is not None
        assert [path for path in stage.inputs(recipe).values() if not path.exists()] == []
