"""A bundle is damaged in every way that a device would not notice; each must be caught by name."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdconvert.android.artifact import tar_path
from sdconvert.android.verify import describe_bundle, opened_bundle, verify_bundle
from sdconvert.errors import UsageError
from sdconvert.io.files import sha256_file


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "bundle")


def test_an_untouched_bundle_passes_as_folder_and_as_tar(bundle: Path) -> None:
    assert verify_bundle(bundle) == verify_bundle(tar_path(bundle))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_anywhere_is_caught_and_the_file_named(bundle: Path, data: st.DataObject) -> None:
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    target = data.draw(st.sampled_from(files))
    original = target.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    damaged = bytearray(original)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        target.write_bytes(damaged)
        with pytest.raises(UsageError, match=target.name.replace(".", r"\.")):
            verify_bundle(bundle)
    finally:
        target.write_bytes(original)
    verify_bundle(bundle)


def test_a_flipped_byte_in_the_tar_is_caught(bundle: Path, tmp_path: Path) -> None:
    tar = Path(shutil.copy(tar_path(bundle), tmp_path))
    with tarfile.open(tar) as archive:
        member = archive.getmember("bundle/models/SM8650/gate_qnn.bin")
    with tar.open("r+b") as file:
        file.seek(member.offset_data + member.size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UsageError, match="models/SM8650/gate_qnn.bin: .* bytes with sha256"):
        verify_bundle(tar)


def test_a_tar_that_was_cut_anywhere_is_caught(bundle: Path, tmp_path: Path) -> None:
    content = tar_path(bundle).read_bytes()
    with tarfile.open(tar_path(bundle)) as archive:
        last = archive.getmembers()[-1]
    # In the middle, within the last file, and between two files, where the rest reads like a smaller tar.
    for cut in (len(content) // 2, last.offset_data + 1, last.offset):
        (tmp_path / "half.tar").write_bytes(content[:cut])
        with pytest.raises(UsageError, match=r"`.*half\.tar` ends early") as caught:
            verify_bundle(tmp_path / "half.tar")
        assert "copy it again" in caught.value.hint


def write_tar(path: Path, *members: tuple[str, bytes, bytes]) -> Path:
    """Write a tar of members: name, type and content or, for links, target."""
    with tarfile.open(path, "w") as archive:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.REGTYPE:
                member.size = len(content)
            else:
                member.linkname = content.decode()
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("bundle/../../x", tarfile.REGTYPE, b"x")], "`bundle/../../x` of .* leads out of the bundle"),
        ([("/etc/x", tarfile.REGTYPE, b"x")], "`/etc/x` of .* leads out of the bundle"),
        ([("bundle/a b", tarfile.REGTYPE, b"x")], "`bundle/a b` of .* leads out of the bundle"),
        (
            [("bundle/x", tarfile.SYMTYPE, b"/etc/passwd")],
            "`bundle/x` of .* is no file, and may lead out of the bundle",
        ),
        ([("bundle/x", tarfile.LNKTYPE, b"../y")], "`bundle/x` of .* is no file, and may lead out of the bundle"),
        ([("bundle/x", tarfile.REGTYPE, b"1"), ("bundle/x", tarfile.REGTYPE, b"2")], "holds `x` twice"),
    ],
)
def test_a_tar_cannot_lead_out_of_the_bundle(
    tmp_path: Path, members: list[tuple[str, bytes, bytes]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        verify_bundle(write_tar(tmp_path / "b.tar", *members))


def test_a_folder_cannot_lead_out_of_the_bundle(copy: Path) -> None:
    inputs = copy / "inputs/gate-china/latent.raw"
    shutil.copy(inputs, copy.parent)
    inputs.unlink()
    inputs.symlink_to(copy.parent / "latent.raw")
    with pytest.raises(UsageError, match=r"`inputs/gate-china/latent\.raw` of bundle .* is a link"):
        verify_bundle(copy)


def test_a_list_of_inputs_cannot_lead_out_of_the_bundle(copy: Path) -> None:
    listed = copy / "input_list_gate.txt"
    listed.write_text(listed.read_text().replace("inputs/gate-china/latent.raw", "../../secret.raw"))
    resign(copy)
    with pytest.raises(UsageError, match=r"input_list_gate\.txt: does not name the samples of `gate`"):
        verify_bundle(copy)


def test_a_manifest_edited_by_hand_is_told_from_a_damaged_list(copy: Path) -> None:
    manifest = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(manifest.replace('"gate-test"', '"gate-best"'))
    with pytest.raises(UsageError, match=r"manifest\.json: was changed after the bundle was written"):
        verify_bundle(copy)
    (copy / "manifest.json").write_text(manifest)
    with (copy / "sums.txt").open("a") as file:
        file.write("more\n")
    with pytest.raises(UsageError, match=r"sums\.txt: does not list the files as they are"):
        verify_bundle(copy)


def test_a_context_elsewhere_is_not_found_on_the_device(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    for graph in manifest["graphs"]:
        graph["context"] = "models/SM8650/gate_qnn.bin"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    resign(copy)
    with pytest.raises(UsageError, match="the device looks for the context of `gate` at models/SM8550/gate_qnn.bin"):
        verify_bundle(copy)


def test_a_bundle_of_another_version_says_which(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    # A newer format may hold anything besides.
    (copy / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 2, "more": [1]}))
    with pytest.raises(UsageError, match=r"is of format 2; this sdconvert .* reads format 1") as caught:
        verify_bundle(copy)
    assert "with this sdconvert" in caught.value.hint


def test_a_tar_is_unpacked_for_as_long_as_it_is_used(bundle: Path) -> None:
    with opened_bundle(bundle) as (folder, manifest):
        assert folder == bundle
    with opened_bundle(tar_path(bundle)) as (folder, unpacked):
        assert verify_bundle(folder) == unpacked == manifest
    assert not folder.exists()


def test_missing_and_foreign_files_are_named(copy: Path) -> None:
    (copy / "inputs/gate-china/latent.raw").unlink()
    (copy / "libQnnHtp.so").write_bytes(b"x")
    with pytest.raises(UsageError, match="is damaged") as caught:
        verify_bundle(copy)
    assert "inputs/gate-china/latent.raw: missing" in str(caught.value)
    assert "libQnnHtp.so: not in the manifest" in str(caught.value)


def resign(bundle: Path) -> None:
    """Make every checksum right again, as a careless hand would: only the meaning is wrong then."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        record |= {"sha256": sha256_file(bundle / name), "bytes": (bundle / name).stat().st_size}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    names = sorted([*manifest["files"], "manifest.json"])
    (bundle / "sums.txt").write_text("".join(f"{sha256_file(bundle / name)}  {name}\n" for name in names))


def test_resigning_an_untouched_bundle_changes_nothing(copy: Path) -> None:
    resign(copy)
    verify_bundle(copy)


def test_a_context_of_another_soc_is_caught_though_its_checksum_fits(copy: Path) -> None:
    shutil.copy(copy / "models/SM8550/gate_qnn.bin", copy / "models/SM8650/gate_qnn.bin")
    resign(copy)
    with pytest.raises(UsageError, match="models/SM8650/gate_qnn.bin: says soc_type = SM8550, the manifest SM8650"):
        verify_bundle(copy)


def test_another_compiler_build_is_caught(copy: Path) -> None:
    context = copy / "models/SM8650/gate_qnn.bin"
    context.write_bytes(context.read_bytes().replace(b"v2.51.0.26", b"v2.40.0.26"))
    resign(copy)
    with pytest.raises(UsageError, match="says QAIRT 2.40.0"):
        verify_bundle(copy)


def test_what_is_no_context_is_caught(copy: Path) -> None:
    (copy / "models/SM8650/gate_qnn.bin").write_bytes(b"")
    resign(copy)
    with pytest.raises(UsageError, match="`models/SM8650/gate_qnn.bin` carries no soc_type"):
        verify_bundle(copy)


def test_a_tensor_of_the_wrong_size_is_caught(copy: Path) -> None:
    with (copy / "expected/gate-china/out_sample.sim.SM8650.raw").open("ab") as file:
        file.write(bytes(4))
    resign(copy)
    with pytest.raises(UsageError, match=r"out_sample.sim.SM8650.raw: 772 bytes, its shape \[1, 3, 8, 8\] says 768"):
        verify_bundle(copy)


def test_a_sample_without_its_file_is_caught(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["files"]["inputs/gate-china/latent.raw"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / "inputs/gate-china/latent.raw").unlink()
    resign(copy)
    with pytest.raises(UsageError, match="latent.raw: not in the manifest, but sample `gate-china` needs it"):
        verify_bundle(copy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("graphs", [], "refers to what it does not list: graph gate"),
        ("chains", [{"name": "net", "parts": ["gate", "tail"], "outputs": ["out_sample"]}], "not list: graph tail"),
        ("chains", [{"name": "net", "parts": ["gate"], "outputs": ["y"]}], "not list: tensor y"),
        ("extra", 1, "extra"),
    ],
)
def test_a_manifest_that_does_not_validate_says_where(copy: Path, key: str, value: object, message: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(UsageError, match=f"manifest.json of .* is damaged.*{message}"):
        verify_bundle(copy)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no bundle at"):
        verify_bundle(tmp_path / "none")
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        verify_bundle(tmp_path)
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(UsageError, match="no readable tar"):
        describe_bundle(tmp_path / "text.tar")


def test_the_description_is_plain_data(bundle: Path) -> None:
    told = describe_bundle(tar_path(bundle))
    assert json.loads(json.dumps(told)) == told
    assert [soc["vtcm_mb"] for soc in told["socs"]] == [8, 8]
    assert [(graph["name"], graph["soc"]) for graph in told["graphs"]] == [("gate", "SM8650"), ("gate", "SM8550")]
    assert told["graphs"][0]["inputs"] == {"latent": [1, 3, 8, 8], "residual": [1, 3, 8, 8]}
    assert told["samples"] == ["gate-chelsea", "gate-china"]
    assert told["pictures"] == []
    assert told["files"] == 17
