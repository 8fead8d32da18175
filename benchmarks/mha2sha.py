"""`sdconvert mha2sha` on PASD's UNet at full size against `cp` of the same file, and against load, split, save.

python benchmarks/mha2sha.py [--rounds 5] [--form safetensors|pth] [--folder build/bench-mha2sha] [--keep]

Per round, in alternating order, each into an empty place: plain `cp`, which lets the kernel copy, and may share blocks
where the file system can; `cp --reflink=never`, which reads and writes; the command without verification; with it; and
what the command replaces: torch loads the file, the heads are cut in memory, torch saves. The source is in the page
cache, what earlier runs wrote is on the disk before a run starts, and Python's bytecode is cached, as it is after any
first run. `written` is the time until the process ends, `on disk` until its files are synced, for all alike. Ratios are
to plain `cp` of the same round. Needs about 14 GB of disk.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

MAKER = Path(__file__).parents[1] / "scripts" / "make_fullsize.py"
# What the command replaces; it knows weights without bias and one number of heads.
LOAD_SPLIT_SAVE = """
import sys, torch
from safetensors.torch import load_file, save_file
source, target = sys.argv[1:]
is_pth = source.endswith(".pth")
state_dict = torch.load(source) if is_pth else load_file(source)
new = {}
for key, value in state_dict.items():
    for name in ("to_q", "to_k", "to_v"):
        if key.endswith(name + ".weight"):
            for i, rows in enumerate(value.chunk(8)):
                new[key.replace(name, f"{name}_convs.{i}")] = rows[:, :, None, None].clone()
for key in [key for key in state_dict if key.endswith(("to_q.weight", "to_k.weight", "to_v.weight"))]:
    del state_dict[key]
state_dict.update(new)
torch.save(state_dict, target) if is_pth else save_file(state_dict, target)
"""


@dataclass(frozen=True)
class Run:
    """What one process took."""

    written_s: float
    on_disk_s: float
    peak_rss_mb: float


def commands(source: Path, out: Path) -> dict[str, list[str]]:
    """The processes to compare; each writes below `out`."""
    weights = next(source.glob("state_dict_mha.*"))
    copy, python = out / weights.name, sys.executable
    convert = [python, "-m", "sdconvert", "mha2sha", str(source), "-o", str(out / "sha")]
    return {
        "cp": ["cp", str(weights), str(copy)],
        "cp --reflink=never": ["cp", "--reflink=never", str(weights), str(copy)],
        "mha2sha --no-verify": [*convert, "--no-verify"],
        "mha2sha": convert,
        "load, split, save": [python, "-c", LOAD_SPLIT_SAVE, str(weights), str(copy)],
    }


def measure(command: list[str], out: Path) -> Run:
    """Run a process in a fresh folder; its peak RSS is the kernel's figure for it alone."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.sync()
    start = time.perf_counter()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    written = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} … ended with {process.returncode}")
    for file in _files(out):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    return Run(written, time.perf_counter() - start, usage.ru_maxrss / 1000)


def compare(source: Path, out: Path, rounds: int) -> dict[str, list[Run]]:
    """Alternate the processes, behind one run that leaves the bytecode."""
    processes = commands(source, out)
    measure(processes["mha2sha"], out)
    runs: dict[str, list[Run]] = {name: [] for name in processes}
    for index in range(rounds):
        for name in list(processes)[:: -1 if index % 2 else 1]:
            for file in _files(source):  # into the page cache
                subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
            runs[name].append(measure(processes[name], out))
    shutil.rmtree(out)
    return runs


def table(form: str, runs: Mapping[str, list[Run]]) -> str:
    """Medians with smallest and largest, and ratios to `cp` round by round."""
    lines = [f"{form:20} {'written, s':>20} {'× cp':>18} {'on disk, s':>20} {'× cp':>18} {'RSS, MB':>8}"]
    base = next(iter(runs.values()))
    for name, found in runs.items():
        cells = []
        for field in ("written_s", "on_disk_s"):
            seconds = [getattr(run, field) for run in found]
            ratios = [own / getattr(other, field) for own, other in zip(seconds, base, strict=True)]
            cells += [f"{_spread(seconds, 1):>20}", f"{_spread(ratios, 2):>18}"]
        lines.append(f"{name:20} {' '.join(cells)} {max(run.peak_rss_mb for run in found):8.0f}")
    return "\n".join(lines)


def main() -> None:
    """Make the model, compare, print."""
    parser = argparse.ArgumentParser(description="Measure `sdconvert mha2sha` against `cp`.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--form", choices=("safetensors", "pth"), help="default: both")
    parser.add_argument("--folder", type=Path, default=Path("build/bench-mha2sha"))
    parser.add_argument("--keep", action="store_true", help="keep the model that was made, for the next time")
    given = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}")
    print(f"load average {os.getloadavg()[0]:.1f}, {given.rounds} rounds; median (smallest to largest)")
    for form in [given.form] if given.form else ("safetensors", "pth"):
        made = given.folder / form
        if not made.is_dir():
            command = [sys.executable, str(MAKER), str(made), "--graph", "unet", "--form", form]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        runs = compare(made / "unet", given.folder / "out", given.rounds)
        print(f"\n{table(form, runs)}", flush=True)
        (given.folder / f"{form}.json").write_text(json.dumps({k: [vars(run) for run in v] for k, v in runs.items()}))
        if not given.keep:
            shutil.rmtree(made)


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
