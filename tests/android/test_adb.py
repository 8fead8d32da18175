"""The real adb client against the rig's daemon: what is believed of its answers, and what a broken connection is."""

import signal
import subprocess
from pathlib import Path

import pytest
from adb_rig import Rig, adb_version, bundled_adb, other_adb, until
from phone import Phone

from sdconvert.android.adb import Adb, find_adb
from sdconvert.errors import (
    DeviceError,
    DeviceFullError,
    DeviceLostError,
    DeviceTimeoutError,
    EnvironmentProblem,
    UsageError,
)


def client(rig: Rig, phone: Phone) -> Adb:
    return Adb(rig.binary, phone.daemon.serial)


def test_two_versions_of_the_client_are_covered() -> None:
    other = other_adb()
    if not other:
        pytest.skip(f"no adb on PATH that is another than the bundled {adb_version(bundled_adb())}; apt has 29")
    assert adb_version(other) != adb_version(bundled_adb())


@pytest.mark.parametrize("newer", [True, False])
def test_the_daemon_serves_what_the_clients_ask(rig: Rig, tmp_path: Path, newer: bool) -> None:
    phone = rig.phone(newer=newer)
    at = ("-s", phone.daemon.serial)
    assert "model:Rig" in rig.adb("devices", "-l").stdout
    said = rig.adb(*at, "shell", "cat; echo err >&2; exit 42", input="typed\n")
    assert (said.returncode, said.stdout, said.stderr) == (42, "typed\n", "err\n")
    assert rig.adb(*at, "exec-out", "printf 'a\\0b'").stdout == "a\0b"
    assert rig.adb(*at, "shell", "kill -9 $$").returncode == 128 + signal.SIGKILL
    folder = tmp_path / "tree" / "deep"
    folder.mkdir(parents=True)
    (folder / "big").write_bytes(bytes(range(256)) * 1000)
    (folder / "empty").touch()
    assert rig.adb(*at, "push", str(tmp_path / "tree"), "/data/local/tmp/tree").returncode == 0
    assert phone.pushed_bytes == 256_000
    assert (
        sorted(rig.adb(*at, "ls", "/data/local/tmp/tree/deep").stdout.split()[3::4]) == [".", "..", "big", "empty"][2:]
    )
    assert rig.adb(*at, "pull", "/data/local/tmp/tree", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back/deep/big").read_bytes() == (folder / "big").read_bytes()
    assert rig.adb(*at, "pull", "/data/local/tmp/none", str(tmp_path / "none")).returncode == 1
    assert "not found" in rig.adb(*at, "shell", "python3 -V").stderr


def test_a_command_answers_with_its_own_code_and_text(rig: Rig) -> None:
    adb = client(rig, rig.phone())
    answer = adb.shell("printf 'no newline'; echo oops >&2; exit 3", timeout_s=10, doing="it was tried")
    assert (answer.code, answer.out, answer.err) == (3, "no newline", "oops\n")
    with pytest.raises(DeviceError, match="refused while it was tried: oops") as caught:
        adb.shell_ok("echo oops >&2; false", timeout_s=10, doing="it was tried")
    assert caught.value.exit_code == 7


def test_files_go_there_and_back(rig: Rig, tmp_path: Path) -> None:
    adb = client(rig, rig.phone())
    sent = tmp_path / "-dash"
    sent.write_bytes(b"x" * 200_000)
    adb.push([sent], "/data/local/tmp", timeout_s=10)
    adb.pull("/data/local/tmp/-dash", tmp_path / "back", timeout_s=10)
    assert (tmp_path / "back").read_bytes() == sent.read_bytes()
    with pytest.raises(DeviceError, match=r"refused while files were sent: .*Not a directory"):
        adb.push([sent], "/data/local/tmp/-dash", timeout_s=10)


@pytest.mark.parametrize("code", [0, 5])
def test_an_answer_cut_short_is_none_whatever_adb_ends_with(rig: Rig, code: int) -> None:
    phone = rig.phone()
    phone.trap("output", "first", phone.unplug)
    with pytest.raises(DeviceLostError, match="broke while it was tried") as caught:
        client(rig, phone).shell(f"echo first; sleep 5; exit {code}", timeout_s=10, doing="it was tried")
    assert "the same command again" in caught.value.hint


def test_a_hung_command_is_ended_here_and_there(rig: Rig) -> None:
    phone = rig.phone()
    with pytest.raises(DeviceTimeoutError, match=r"within 1 s while it was tried; its last words were `began`"):
        client(rig, phone).shell("echo began; exec sleep 1000", timeout_s=1, doing="it was tried")
    until(lambda: not phone.running())


def test_a_killed_server_is_a_broken_connection(rig: Rig) -> None:
    phone = rig.phone()
    phone.trap("output", "first", rig.kill_server)
    with pytest.raises(DeviceLostError):
        client(rig, phone).shell("echo first; sleep 5", timeout_s=10, doing="it was tried")


def test_a_cable_pulled_while_files_go_is_a_broken_connection(rig: Rig, tmp_path: Path) -> None:
    phone = rig.phone()
    big = tmp_path / "big"
    big.write_bytes(bytes(3_000_000))
    phone.trap("data", "big", phone.unplug, after=1_000_000)
    with pytest.raises(DeviceLostError, match="while files were sent"):
        client(rig, phone).push([big], "/data/local/tmp", timeout_s=10)
    rig.replug(phone)
    client(rig, phone).push([big], "/data/local/tmp", timeout_s=10)
    phone.trap("recv", "big", phone.unplug, after=1_000_000)
    with pytest.raises(DeviceLostError, match="while results were fetched"):
        client(rig, phone).pull("/data/local/tmp/big", tmp_path / "back", timeout_s=10)


def test_a_full_phone_says_so_and_keeps_no_half_file(rig: Rig, tmp_path: Path) -> None:
    phone = rig.phone(capacity=100_000)
    big = tmp_path / "big"
    big.write_bytes(bytes(300_000))
    with pytest.raises(DeviceFullError, match="ran out of space while files were sent"):
        client(rig, phone).push([big], "/data/local/tmp", timeout_s=10)
    assert not phone.path("/data/local/tmp/big").exists()


def test_a_full_disk_here_is_not_the_phones_fault(rig: Rig, small_disk: Path) -> None:
    phone = rig.phone()
    phone.path("/data/local/tmp/big").write_bytes(bytes(300_000))
    with pytest.raises(EnvironmentProblem, match="no space left on the disk of"):
        client(rig, phone).pull("/data/local/tmp/big", small_disk / "big", timeout_s=10)


def test_a_phone_that_no_longer_trusts_this_computer(rig: Rig) -> None:
    phone = rig.phone(authorized=False)
    with pytest.raises(DeviceError, match="no longer allows this computer in") as caught:
        client(rig, phone).shell("true", timeout_s=10, doing="it was tried")
    assert "accept the dialog" in caught.value.hint


def test_which_adb_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "adb"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    assert find_adb(own) == own
    with pytest.raises(UsageError, match="no adb at"):
        find_adb(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_adb() == own
    own.unlink()
    assert find_adb() == bundled_adb()
    monkeypatch.setattr("sdconvert.android.adb.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="`adb` is not installed"):
        find_adb()


def test_an_adb_that_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "adb").write_bytes(b"\x7fELF")
    with pytest.raises(EnvironmentProblem, match="cannot be run"):
        Adb(tmp_path / "adb").call("version", timeout_s=10, doing="it was tried")
    assert subprocess.run([bundled_adb(), "version"], check=False, capture_output=True).returncode == 0
