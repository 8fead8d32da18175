"""docs/adding_a_model_family.md does what it says: its files, beside sdconvert, are a family from outside."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import onnx
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/adding_a_model_family.md").read_text()


def blocks() -> dict[str, str]:
    """The page's files by name: a line with the name in backquotes, and the block after it."""
    return dict(re.findall(r"^`([\w/.]+)`\n\n```\w+\n(.*?)^```", PAGE, re.M | re.S))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` of the page's package leaves."""
    folder = tmp_path_factory.mktemp("site")
    files = blocks()
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    for name, code in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    (folder / "stripes/__init__.py").touch()
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, points),) = project["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {module}" for name, module in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


# One process for all commands: importing torch and diffusers anew for each takes longer than the commands.
DRIVER = """
import sys
from sdconvert.cli.app import main
for program, *arguments in {commands}:
    print("$", *arguments[:2], flush=True)
    if program == "python":
        exec(arguments[1])
        continue
    try:
        main(["--json", *arguments])
    except SystemExit as left:
        if left.code:
            raise
"""


def run(folder: Path) -> dict[str, str]:
    """Run the page's commands in the folder; what each prints, by its first two words."""
    (console,) = re.findall(r"^```console\n(.*?)^```", PAGE, re.M | re.S)
    commands = [shlex.split(line.removeprefix("$ ")) for line in console.splitlines()]
    finished = subprocess.run(
        [sys.executable, "-c", DRIVER.format(commands=commands)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    answers = (part.partition("\n") for part in finished.stdout.removeprefix("$ ").split("\n$ "))
    return {command: answer for command, _, answer in answers}


def test_x1_a_family_from_outside_is_listed_and_takes_the_road(folder: Path) -> None:
    answers = run(folder)
    families = {one["model"]: one for one in json.loads(answers["adapters list"])["families"]}
    assert families["StripesModel"] == {
        "model": "StripesModel",
        "adapter": "StripesModelAdapter",
        "module": "stripes.stripes_adapter",
        "graph": "stripes",
        "capabilities": {
            "quantize": True,
            "mha2sha": True,
            "adaround": False,
            "cfg_split": False,
            "block_parallel": False,
        },
    }
    assert families["UNet2DConditionModel"]["capabilities"]["adaround"]
    checked = json.loads(answers["adapters check"])
    assert checked["onnx_vs_torch_db"] >= 100
    assert checked["blocks"] == ["time_embedding", "conv_in", "blocks.0", "blocks.1", "conv_out"]
    assert [(one["path"], one["heads"], one["kind"]) for one in checked["attention_layers"]] == [
        ("blocks.0", 4, "cross"),
        ("blocks.1", 4, "cross"),
    ]
    assert [value.name for value in onnx.load(str(folder / "stripes.onnx")).graph.input] == list(checked["inputs"])


def test_the_page_s_package_is_no_part_of_this_process() -> None:
    assert "stripes" not in sys.modules
