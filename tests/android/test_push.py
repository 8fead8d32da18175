"""A bundle reaches a phone whole or is recognised as unfinished, and is never sent twice."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from adb_rig import Rig
from phone import Phone

from sdconvert.android.adb import Adb
from sdconvert.android.manifest import Manifest
from sdconvert.android.push import LocalFile, PushReport, device_files, local_file, push
from sdconvert.android.verify import verify_bundle
from sdconvert.errors import DeviceError, DeviceFullError, DeviceLostError, UsageError

REMOTE = "/data/local/tmp/sdconvert"
LIBRARY = "lib/libQnnHtp.so"


class Pushed:
    """One bundle and one phone."""

    def __init__(self, rig: Rig, phone: Phone, bundle: Path) -> None:
        self.rig, self.phone, self.bundle = rig, phone, bundle
        self.folder = phone.path(f"{REMOTE}/bundle")

    def files(self) -> dict[str, LocalFile]:
        """What the bundle has for the phone, and a library of the user's beside it."""
        manifest = Manifest.model_validate_json((self.bundle / "manifest.json").read_bytes())
        library = self.bundle.parent / "libQnnHtp.so"
        return {**device_files(self.bundle, manifest, "SM8650"), LIBRARY: local_file(library)}

    def push(self) -> PushReport:
        return push(Adb(self.rig.binary, self.phone.daemon.serial), self.files(), REMOTE)

    def there(self) -> dict[str, str]:
        """Return every file of the phone's folder with its checksum."""
        return {
            path.relative_to(self.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.folder.rglob("*")
            if path.is_file()
        }

    def is_complete(self) -> bool:
        wanted = {name: file.sha256 for name, file in self.files().items()}
        there = self.there()
        return bool(there.pop("sums.txt", None)) and there == wanted


@pytest.fixture
def pushed(rig: Rig, bundle: Path, tmp_path: Path) -> Pushed:
    (tmp_path / "libQnnHtp.so").write_bytes(bytes(range(256)) * 2000)
    return Pushed(rig, rig.phone(), shutil.copytree(bundle, tmp_path / "bundle"))


def test_a_phone_gets_its_contexts_and_inputs_and_no_answers(pushed: Pushed) -> None:
    told = pushed.push()
    assert pushed.is_complete()
    assert set(pushed.there()) == {
        "manifest.json",
        "sums.txt",
        "input_list_gate.txt",
        LIBRARY,
        "models/SM8650/gate_qnn.bin",
        *(f"inputs/gate-{name}/{tensor}.raw" for name in ("chelsea", "china") for tensor in ("latent", "residual")),
    }
    assert told.sent_files == 9
    assert told.sent_bytes == pushed.phone.pushed_bytes == sum(p.stat().st_size for p in pushed.folder.rglob("*.*"))


def test_an_unchanged_bundle_is_not_sent_again(pushed: Pushed) -> None:
    pushed.push()
    pushed.phone.pushed_bytes, pushed.phone.commands = 0, []
    pushed.phone.trap("send", "", lambda: pytest.fail("something was sent"))
    assert pushed.push() == PushReport(sent_files=0, sent_bytes=0, kept_files=9, removed_files=0)
    assert pushed.phone.pushed_bytes == 0
    assert len(pushed.phone.commands) == 1


def test_a_flipped_byte_on_the_phone_is_repaired_alone(pushed: Pushed) -> None:
    pushed.push()
    flip(pushed.folder / "inputs/gate-china/latent.raw")
    told = pushed.push()
    # The manifest vouches for the folder, so it goes first and comes back last.
    assert (told.sent_files, told.kept_files) == (2, 7)
    assert pushed.is_complete()


def test_what_a_new_bundle_lacks_is_removed(pushed: Pushed) -> None:
    pushed.push()
    (pushed.folder / "models/SM8650/it's old").write_text("x")
    manifest = json.loads((pushed.bundle / "manifest.json").read_text())
    manifest["samples"] = [sample for sample in manifest["samples"] if sample["id"] != "gate-china"]
    manifest["files"] = {name: record for name, record in manifest["files"].items() if "gate-china" not in name}
    (pushed.bundle / "manifest.json").write_text(json.dumps(manifest))
    told = pushed.push()
    assert (told.sent_files, told.removed_files) == (2, 3)
    assert pushed.is_complete()


PHASES = {
    "checksums": ("shell", "find .*sha256sum", 0),
    "removal": ("shell", "rm -f manifest.json", 0),
    "first file": ("send", "", 0),
    "inside a file": ("data", LIBRARY, 65536),
    "last file": ("send", "latent.raw", 0),
    "renaming": ("shell", r"mv -f \.incoming/models", 0),
    "before the manifest": ("shell", "sync", 0),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_pulled_cable_leaves_nothing_half_valid_and_the_next_run_goes_on(pushed: Pushed, phase: str) -> None:
    event, pattern, after = PHASES[phase]
    pushed.phone.trap(event, pattern, pushed.phone.unplug, after=after)
    with pytest.raises(DeviceLostError) as caught:
        pushed.push()
    assert (caught.value.exit_code, "goes on from there" in caught.value.hint) == (7, True)
    assert not pushed.phone.traps
    assert "manifest.json" not in pushed.there()
    already = {name for name, found in pushed.there().items() if found in wanted_sums(pushed)}
    pushed.rig.replug(pushed.phone)
    told = pushed.push()
    assert told.sent_files == 9 - len(already)
    assert pushed.is_complete()
    if phase in ("renaming", "before the manifest"):
        assert told.sent_bytes == 0


def test_a_bundle_that_is_being_replaced_is_not_complete_meanwhile(pushed: Pushed) -> None:
    pushed.push()
    flip(pushed.folder / "inputs/gate-china/latent.raw")
    pushed.phone.trap("shell", r"mkdir -p \.incoming", pushed.phone.unplug)
    with pytest.raises(DeviceLostError):
        pushed.push()
    assert "inputs/gate-china/latent.raw" in pushed.there()
    assert "manifest.json" not in pushed.there()
    pushed.rig.replug(pushed.phone)
    assert pushed.push().sent_files == 2
    assert pushed.is_complete()


def wanted_sums(pushed: Pushed) -> set[str]:
    sums = {file.sha256 for file in pushed.files().values()}
    text = "".join(f"{file.sha256}  {name}\n" for name, file in sorted(pushed.files().items()))
    return sums | {hashlib.sha256(text.encode()).hexdigest()}


def test_a_killed_server_is_survived(pushed: Pushed) -> None:
    pushed.phone.trap("data", LIBRARY, pushed.rig.kill_server, after=65536)
    with pytest.raises(DeviceLostError):
        pushed.push()
    assert "manifest.json" not in pushed.there()
    pushed.rig.connect(pushed.phone)
    pushed.push()
    assert pushed.is_complete()


def test_a_phone_that_fills_up_on_the_way(pushed: Pushed) -> None:
    pushed.phone.capacity = 200_000
    with pytest.raises(DeviceFullError, match="ran out of space while files were sent") as caught:
        pushed.push()
    assert caught.value.exit_code == 7
    assert "manifest.json" not in pushed.there()
    already = pushed.there()
    assert set(already.values()) <= wanted_sums(pushed)
    pushed.phone.capacity = None
    assert pushed.push().sent_files == 9 - len(already)
    assert pushed.is_complete()


def test_too_little_space_is_told_before_anything_is_sent(pushed: Pushed) -> None:
    pushed.phone.prints("df", "Filesystem 1K-blocks Used Available Use% Mounted on\n/dev/dm-5 100 90 10 90% /data\n")
    with pytest.raises(DeviceFullError, match=r"has 0\.0 MB free below .*; \d\.\d MB are to be sent"):
        pushed.push()
    assert pushed.phone.pushed_bytes == 0


def test_a_byte_that_flips_on_the_way_is_noticed(pushed: Pushed) -> None:
    incoming = pushed.folder / ".incoming/models/SM8650/gate_qnn.bin"
    # The second list of checksums is taken when everything has arrived.
    pushed.phone.trap("shell", "mkdir -p .incoming", lambda: on_next_sums(pushed.phone, lambda: flip(incoming)))
    with pytest.raises(DeviceError, match=r"`models/SM8650/gate_qnn\.bin` did not arrive on device"):
        pushed.push()
    assert "manifest.json" not in pushed.there()
    assert pushed.push().sent_files == 1
    assert pushed.is_complete()


def on_next_sums(phone: Phone, action: Callable[[], None]) -> None:
    phone.trap("shell", "find .*sha256sum", action)


def test_a_byte_that_flipped_here_is_not_sent(pushed: Pushed) -> None:
    flip(pushed.bundle / "models/SM8650/gate_qnn.bin")
    with pytest.raises(UsageError, match=r"gate_qnn\.bin` is not what the bundle's manifest says") as caught:
        pushed.push()
    assert caught.value.exit_code == 2
    assert "models/SM8650/gate_qnn.bin" not in pushed.there()


@pytest.mark.parametrize(
    "name", ["../up", "/etc/passwd", "a/../../b", "a b", "-rf", ".hidden", "a;b", "$(x)", "a\nb", ""]
)
def test_names_that_leave_the_bundle_are_refused(pushed: Pushed, name: str) -> None:
    files = {**pushed.files(), name: local_file(pushed.bundle / "sums.txt")}
    with pytest.raises(UsageError, match="could lead out of the bundle"):
        push(Adb(pushed.rig.binary, pushed.phone.daemon.serial), files, REMOTE)
    manifest = json.loads((pushed.bundle / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["input_list_gate.txt"]
    (pushed.bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"manifest\.json of .*, which could lead out of the bundle"):
        verify_bundle(pushed.bundle)
    assert pushed.phone.commands == []


def test_links_that_leave_the_bundle_are_refused(pushed: Pushed, tmp_path: Path) -> None:
    target = pushed.bundle / "input_list_gate.txt"
    target.unlink()
    (tmp_path / "secret").write_text("x")
    target.symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match=r"`input_list_gate\.txt` of bundle .* leads out of it"):
        pushed.push()


@pytest.mark.parametrize("remote", ["relative/x", "/", "/data", "/data/../etc", "/data/a b", "/data//x", "/data/x/"])
def test_folders_that_are_not_for_bundles_are_refused(pushed: Pushed, remote: str) -> None:
    with pytest.raises(UsageError, match="cannot be a folder for bundles"):
        push(Adb(pushed.rig.binary, pushed.phone.daemon.serial), pushed.files(), remote)


def test_a_file_beside_the_bundle_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file at"):
        local_file(tmp_path / "libQnnHtp.so")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
