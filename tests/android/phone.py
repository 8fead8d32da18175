"""A phone of the test rig: a folder as its file system, Android's shell where installed, and an adb daemon.

What the rig assumes of a phone is written down here: which properties it has, which commands are on its PATH, what
`dumpsys` and `df` print, and that adbd answers errors as text. Only a phone can confirm it.
"""

import errno
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from adb_daemon import Daemon, Stream, Trap
from adb_shell import serve_shell
from adb_sync import SyncService

_FEATURES = ("shell_v2", "cmd", "fixed_push_mkdir")
_NEWER_FEATURES = ("stat_v2", "ls_v2", "sendrecv_v2")
# What Android has on its PATH; anything else must not be found.
_COMMANDS = re.findall(
    r"\S+",
    "[ cat chmod cp cut date dirname du echo expr false find grep head id kill ln ls mkdir mv nice printf ps pwd rm "
    "rmdir sed sha256sum sleep sort stat sync tail test touch true uname wc xargs",
)
_MAPPED = re.compile(r"(?<![\w./-])/(?=data/local/tmp\b|sys/devices/)")
BATTERY = "Current Battery Service state:\n  AC powered: false\n  USB powered: true\n  level: 83\n  temperature: 291\n"
THERMAL = (
    "IsStatusOverride: false\nThermal Status: 0\nCached temperatures:\n"
    "\tTemperature{mValue=31.4, mType=3, mName=skin, mStatus=0}\n"
    "Current temperatures from HAL:\n"
    "\tTemperature{mValue=31.9, mType=3, mName=skin, mStatus=0}\n"
    "\tTemperature{mValue=41.5, mType=9, mName=nsp0, mStatus=0}\n"
)
# Options of the real runner, one after the other; answers are named after the only output of the test's graph.
_SCRIPTED = """
[ "$1" != --version ] || exit 0
while [ "$1" ]; do
  case $1 in
    --output_dir) out=$2 ;;
    --input_list) list=$2 ;;
    --profiling_level) profile=1 ;;
    --num_inferences) count=$2 ;;
  esac
  shift
done
if [ "$profile" ]; then
  [ -f "$RIG/hot" ] && cp "$RIG/hot" "$RIG/dumpsys-thermalservice"
  cat "$RIG/profile-head" >"$out/qnn-profiling-data_0.log"
  i=0
  while [ "$i" -lt "$count" ]; do
    while read -r row && [ "$i" -lt "$count" ]; do
      echo "$row"
      i=$((i + 1))
    done <"$RIG/profile-rows"
  done >>"$out/qnn-profiling-data_0.log"
  exit 0
fi
i=0
while read -r line; do
  mkdir -p "$out/Result_$i" && cp "$RIG/answer-$i" "$out/Result_$i/out_sample.raw"
  i=$((i + 1))
done <"$list"
"""


class Phone:
    """One device; `daemon.serial` is what `adb connect` takes.

    Args:
        root: The folder that is its file system.
        soc: `ro.soc.model`, empty as before Android 12.
        newer: Whether its adbd knows the second version of the sync protocol.
        authorized: Whether its user has accepted this computer.
        capacity: Bytes that fit below /data/local/tmp; without it as many as the host has room for.
    """

    def __init__(
        self,
        root: Path,
        *,
        soc: str = "SM8650",
        newer: bool = True,
        authorized: bool = True,
        capacity: int | None = None,
    ) -> None:
        self.root, self.authorized, self.capacity = root, authorized, capacity
        self.pushed_bytes = 0
        self.commands: list[str] = []
        self.traps: list[Trap] = []
        self._processes: list[int] = []
        self._make_file_system()
        self.properties(
            {
                "ro.soc.model": soc,
                "ro.product.model": "Rig",
                "ro.product.cpu.abi": "arm64-v8a",
                "ro.build.version.release": "15",
            }
        )
        self.prints("dumpsys-battery", BATTERY)
        self.prints("dumpsys-thermalservice", THERMAL)
        (self.path("/sys/devices/soc0/soc_id")).write_text("557\n")
        features = ",".join(_FEATURES + (_NEWER_FEATURES if newer else ()))
        self.banner = (
            f"device::ro.product.name=rig;ro.product.model=Rig;ro.product.device=rig;features={features}".encode()
        )
        self.daemon = Daemon(self)

    def path(self, name: str) -> Path:
        """Return where a device path lies on the host."""
        return self.root / name.lstrip("/")

    def properties(self, changed: dict[str, str]) -> None:
        """Set system properties, one file each."""
        for name, value in changed.items():
            self.path(f"/properties/{name}").write_text(f"{value}\n")

    def prints(self, name: str, text: str) -> None:
        """Set what `dumpsys SERVICE` prints."""
        self.path(f"/properties/{name}").write_text(text)

    def trap(self, event: str, pattern: str, action: Callable[[], None], *, after: int = 0) -> None:
        """Have a fault happen once: at `send`, `data`, `recv` of a path, at a `shell` command, or at its `output`."""
        self.traps.append(Trap(event, pattern, action, after))

    def stand_in_runner(self, folder: Path) -> Path:
        """Write the stand-in for `qnn-net-run`, which runs contexts in the simulator on this computer."""
        script, root = Path(__file__).with_name("stand_in_runner.py"), Path(__file__).parents[2]
        runner = folder / "qnn-net-run"
        runner.write_text(
            f"#!{self.path('/system/bin/sh')}\n[ $1 != --version ] || exit 0\n"
            f'PYTHONPATH={root} exec {sys.executable} {script} "$@"\n'
        )
        return runner

    def scripted_runner(self, folder: Path, answers: Sequence[Path], times_us: Sequence[int]) -> Path:
        """Write a runner that answers with files and tells given times: for what is made of times, not of answers.

        Its times are `times_us`, again and again. Where the folder of properties has a file `hot`, the phone says that
        from then on of its temperature.
        """
        header = "Msg Timestamp,Message,Time,Unit of Measurement,Timing Source,Event Level,Event Identifier"
        rows = [f"0,EXECUTE,{time},US,BACKEND,ROOT,QNN (execute) time" for time in times_us]
        self.prints("profile-head", f"{header}\n0,INIT,25000,US,BACKEND,ROOT,QNN (load binary) time\n")
        self.prints("profile-rows", "\n".join(rows) + "\n")
        for index, answer in enumerate(answers):
            shutil.copyfile(answer, self.path(f"/properties/answer-{index}"))
        runner = folder / "qnn-net-run"
        runner.write_text(f"#!{self.path('/system/bin/sh')}\n{_SCRIPTED}")
        return runner

    def heats_up(self, status: int, skin: float) -> str:
        """Return what `dumpsys thermalservice` prints at a status and a temperature of the skin."""
        return THERMAL.replace("Status: 0", f"Status: {status}").replace("31.9", f"{skin}")

    def unplug(self) -> None:
        self.daemon.unplug()

    def close(self) -> None:
        """Unplug it, and end what still runs on it."""
        self.unplug()
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)

    def running(self) -> bool:
        """Tell whether anything that was started in the device's shell still runs."""
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                # After the name, which may hold spaces: state, parent, process group.
                state, _, group = entry.read_text().rpartition(")")[2].split()[:3]
                if int(group) in self._processes and state != "Z":
                    return True
        return False

    def serve(self, service: str, stream: Stream) -> None:
        """See `adb_daemon.Services`."""
        kind, _, command = service.partition(":")
        name, *options = kind.split(",")
        if name == "sync":
            SyncService(stream, self.path, self._told, self._count).serve()
        elif name in ("shell", "exec"):
            self._told("shell", command, 0)
            self.commands.append(command)
            serve_shell(
                stream,
                _MAPPED.sub(f"{self.root}/", command),
                shell=self.path("/system/bin/sh"),
                root=self.root,
                environment={"PATH": str(self.path("/system/bin")), "RIG": str(self.path("/properties"))},
                packets="v2" in options,
                heard=lambda text: self._told("output", text, len(text)),
                started=self._processes.append,
            )

    def _told(self, event: str, what: str, nbytes: int) -> None:
        if event == "data" and self.capacity is not None and self._used() >= self.capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for trap in [trap for trap in self.traps if trap.springs(event, what, nbytes)]:
            self.traps.remove(trap)
            trap.action()

    def _count(self, nbytes: int) -> None:
        self.pushed_bytes += nbytes

    def _used(self) -> int:
        return sum(path.stat().st_size for path in self.path("/data/local/tmp").rglob("*") if path.is_file())

    def _make_file_system(self) -> None:
        for folder in ("data/local/tmp", "sys/devices/soc0", "system/bin", "properties"):
            self.path(folder).mkdir(parents=True)
        binaries = self.path("/system/bin")
        toybox = shutil.which("toybox")
        for name in _COMMANDS:
            binaries.joinpath(name).symlink_to(toybox or shutil.which(name) or f"/bin/{name}")
        binaries.joinpath("sh").symlink_to(shutil.which("mksh") or "/bin/sh")
        self._script("getprop", 'read -r value <"$RIG/$1" && echo "$value"')
        self._script("dumpsys", 'cat "$RIG/dumpsys-$1"')
        real_df = f"{toybox} df" if toybox else "/bin/df"
        self._script("df", f'if [ -f "$RIG/df" ]; then cat "$RIG/df"; else exec {real_df} "$@"; fi')

    def _script(self, name: str, text: str) -> None:
        script = self.path(f"/system/bin/{name}")
        script.write_text(f"#!{self.path('/system/bin/sh')}\n{text}\n")
        script.chmod(0o755)
