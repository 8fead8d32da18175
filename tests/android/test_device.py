"""Which phone is meant, and whether it can run a bundle: every answer that is not good has a sentence of its own."""

from pathlib import Path

import pytest
from adb_rig import Rig, until
from phone import THERMAL, Phone

from sdconvert.android.adb import Adb
from sdconvert.android.device import ask_phone, choose_soc, find_device, free_bytes, list_devices
from sdconvert.android.verify import verify_bundle
from sdconvert.errors import DeviceError, SdconvertError, UsageError

REMOTE = "/data/local/tmp/sdconvert"


def ask(rig: Rig, phone: Phone) -> None:
    ask_phone(Adb(rig.binary, phone.daemon.serial), REMOTE)


def test_no_device(rig: Rig) -> None:
    with pytest.raises(DeviceError, match="no Android device is connected") as caught:
        find_device(rig.binary)
    assert caught.value.exit_code == 7
    assert "USB debugging" in caught.value.hint


def test_the_only_device_needs_no_name(rig: Rig) -> None:
    phone = rig.phone()
    assert (
        find_device(rig.binary) == find_device(rig.binary, phone.daemon.serial) == Adb(rig.binary, phone.daemon.serial)
    )
    assert [(device.state, "model:Rig" in device.about) for device in list_devices(rig.binary)] == [("device", True)]


def test_two_devices_need_a_serial(rig: Rig) -> None:
    first, second = rig.phone(), rig.phone()
    with pytest.raises(UsageError, match=r"2 devices are connected: .*\(device\), .*\(device\)") as caught:
        find_device(rig.binary)
    assert caught.value.exit_code == 2
    assert "--serial" in caught.value.hint
    assert find_device(rig.binary, second.daemon.serial).serial == second.daemon.serial
    with pytest.raises(DeviceError, match="no device `nosuch`") as lost:
        find_device(rig.binary, "nosuch")
    assert first.daemon.serial in lost.value.hint


def test_a_phone_that_has_not_accepted_this_computer(rig: Rig) -> None:
    rig.phone(authorized=False)
    with pytest.raises(DeviceError, match="has not allowed this computer in") as caught:
        find_device(rig.binary)
    assert "Allow USB debugging" in caught.value.hint


def test_a_phone_that_does_not_answer(rig: Rig) -> None:
    phone = rig.phone()
    phone.unplug()
    until(lambda: [device.state for device in list_devices(rig.binary)] == ["offline"])
    with pytest.raises(DeviceError, match="is offline: it is known to adb, but does not answer"):
        find_device(rig.binary)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("no permissions (user in plugdev group; are your udev rules wrong?); see [http://x]", "may not be opened by"),
        ("recovery product:x model:y", "is in recovery mode"),
        ("host", "is in the state `host`"),
    ],
)
def test_states_that_only_cables_bring_about(tmp_path: Path, state: str, message: str) -> None:
    # No daemon on TCP can be in these; the line is as adb prints it.
    said = tmp_path / "adb"
    said.write_text(f"#!/bin/sh\ncat <<'END'\nList of devices attached\nR5CT123\t{state}\n\nEND\n")
    said.chmod(0o755)
    with pytest.raises(DeviceError, match=f"device `R5CT123` {message}"):
        find_device(said)


def test_what_a_phone_says_of_itself(rig: Rig) -> None:
    phone = rig.phone(soc="SM8650-AC")
    adb = Adb(rig.binary, phone.daemon.serial)
    told = ask_phone(adb, REMOTE)
    assert (told.soc.name, told.soc_id, told.model, told.android) == ("SM8650", "557", "Rig", "15")
    assert (told.battery_percent, told.battery_celsius, told.thermal_status) == (83, 29.1, 0)
    assert told.free_bytes == pytest.approx(free_bytes(adb, REMOTE), rel=0.1)
    assert told.free_bytes > 0
    assert told.notes == ()
    assert phone.path(REMOTE).is_dir()


def test_a_warm_phone_with_an_empty_battery_is_noted(rig: Rig) -> None:
    phone = rig.phone()
    phone.prints("dumpsys-thermalservice", THERMAL.replace("Thermal Status: 0", "Thermal Status: 2"))
    phone.prints("dumpsys-battery", "  level: 12\n")
    told = ask_phone(Adb(rig.binary, phone.daemon.serial), REMOTE)
    assert told.battery_celsius is None
    assert ["thermal status 2" in told.notes[0], "12 %" in told.notes[1]] == [True, True]


def test_a_phone_that_prints_nothing_of_its_health_is_taken(rig: Rig) -> None:
    phone = rig.phone()
    for name in ("dumpsys-thermalservice", "dumpsys-battery"):
        phone.path(f"/properties/{name}").unlink()
    told = ask_phone(Adb(rig.binary, phone.daemon.serial), REMOTE)
    assert (told.battery_percent, told.thermal_status, told.notes) == (None, None, ())


@pytest.mark.parametrize(
    ("property", "value", "message"),
    [
        ("ro.product.cpu.abi", "x86_64", "is x86_64"),
        ("ro.soc.model", "", r"does not say what SoC it has \(soc_id 557\)"),
        ("ro.soc.model", "MT6989", "has no NPU that sdconvert knows: unknown SoC `MT6989`"),
    ],
)
def test_phones_without_the_npu(rig: Rig, property: str, value: str, message: str) -> None:
    phone = rig.phone()
    phone.properties({property: value})
    with pytest.raises(DeviceError, match=message) as caught:
        ask(rig, phone)
    assert (caught.value.exit_code, bool(caught.value.hint)) == (7, True)


def test_a_folder_that_cannot_be_made(rig: Rig) -> None:
    phone = rig.phone()
    phone.path(REMOTE).write_text("a file")
    with pytest.raises(DeviceError, match=f"while the folder {REMOTE} was made"):
        ask(rig, phone)


def test_free_space_that_cannot_be_read(rig: Rig) -> None:
    phone = rig.phone()
    phone.prints("df", "df: not here\n")
    with pytest.raises(DeviceError, match="does not tell its free space"):
        ask(rig, phone)


def test_a_bundle_for_another_soc(rig: Rig, bundle: Path) -> None:
    manifest = verify_bundle(bundle)
    phone = rig.phone(soc="SM8550P")
    adb = Adb(rig.binary, phone.daemon.serial)
    assert choose_soc(manifest, ask_phone(adb, REMOTE)) == "SM8550"
    phone.properties({"ro.soc.model": "SM8750"})
    with pytest.raises(SdconvertError, match=r"is for SM8650, SM8550; device .* has SM8750") as caught:
        choose_soc(manifest, ask_phone(adb, REMOTE))
    assert caught.value.exit_code == 2
    assert "--soc SM8750" in caught.value.hint
