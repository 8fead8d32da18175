"""What a bundle holds, byte for byte, and what it is refused for."""

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_request import BundleRequest

from sdconvert.android.artifact import AndroidArtifact, tar_path
from sdconvert.errors import EnvironmentProblem, PreconditionError, UsageError
from sdconvert.io.files import sha256_file
from sdconvert.qnn.simulator import Simulator


def test_the_layout_is_what_runners_look_for(bundle: Path) -> None:
    names = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert {
        "manifest.json",
        "sums.txt",
        "models/SM8650/gate_qnn.bin",
        "models/SM8650/gate.ctx.onnx",
        "models/SM8550/gate_qnn.bin",
        "input_list_gate.txt",
        "inputs/gate-china/latent.raw",
        "expected/gate-china/out_sample.fp32.raw",
        "expected/gate-china/out_sample.sim.SM8650.raw",
    } <= names
    assert len(names) == 2 + 4 + 1 + 4 + 2 + 4


def test_raw_files_are_little_endian_float32(bundle: Path, asked: BundleRequest) -> None:
    raw = (bundle / "inputs/gate-chelsea/residual.raw").read_bytes()
    assert np.array_equal(np.frombuffer(raw, "<f4").reshape(1, 3, 8, 8), asked.samples[0].inputs["residual"].numpy())


def test_a_channels_last_tensor_is_written_as_nchw(asked: BundleRequest, tmp_path: Path) -> None:
    sample = asked.samples[0]
    strided = {k: v.to(memory_format=torch.channels_last) for k, v in sample.inputs.items()}
    out = asked.write(tmp_path / "bundle", samples=[replace(sample, inputs=strided)])
    assert (out / "inputs/gate-chelsea/latent.raw").read_bytes() == sample.inputs["latent"].numpy().tobytes()


def test_the_input_list_feeds_qnn_net_run(bundle: Path) -> None:
    lines = (bundle / "input_list_gate.txt").read_text().splitlines()
    assert lines == [
        f"latent:=inputs/{name}/latent.raw residual:=inputs/{name}/residual.raw"
        for name in ("gate-chelsea", "gate-china")
    ]


def test_sums_are_what_sha256sum_checks_on_the_device(bundle: Path) -> None:
    done = subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "sums.txt"], cwd=bundle, check=False)
    assert done.returncode == 0


def test_the_shipped_context_answers_as_recorded(bundle: Path) -> None:
    shape = (1, 3, 8, 8)
    raws = {
        p.stem: torch.from_numpy(np.fromfile(p, "<f4")).reshape(shape) for p in (bundle / "inputs/gate-china").iterdir()
    }
    for soc in ("SM8650", "SM8550"):
        answer = Simulator(bundle / f"models/{soc}/gate.ctx.onnx")(raws)["out_sample"]
        expected = np.fromfile(bundle / f"expected/gate-china/out_sample.sim.{soc}.raw", "<f4").reshape(shape)
        assert np.array_equal(answer.numpy(), expected)


def test_the_tar_is_the_same_wherever_and_whenever_it_is_made(
    bundle: Path, asked: BundleRequest, tmp_path: Path
) -> None:
    again = asked.write(tmp_path / "bundle")
    assert sha256_file(tar_path(again)) == sha256_file(tar_path(bundle))
    subprocess.run(["tar", "xf", tar_path(again)], cwd=tmp_path, check=True)


def test_writing_again_leaves_nothing_of_the_old_bundle(asked: BundleRequest, tmp_path: Path) -> None:
    out = asked.write(tmp_path / "bundle")
    asked.write(out, samples=asked.samples[1:])
    assert [path.name for path in (out / "inputs").iterdir()] == ["gate-china"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.tar"]


def test_the_artifact_finds_the_bundle(bundle: Path, tmp_path: Path) -> None:
    artifact = AndroidArtifact(bundle.parent)
    assert artifact.manifest.model == "gate-test"
    assert artifact.tar.is_file()
    with pytest.raises(PreconditionError, match="holds no bundle"):
        AndroidArtifact(tmp_path)


def test_a_full_disk_leaves_no_half_bundle(asked: BundleRequest, small_disk: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="no space left"):
        asked.write(small_disk / "bundle")
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("name", ["down.0", "a/b", "/latent", "", "latent\n", "lätent"])
def test_names_that_runners_rewrite_are_refused(asked: BundleRequest, tmp_path: Path, name: str) -> None:
    context = asked.contexts[0]
    renamed = replace(context, inputs=(replace(context.inputs[0], name=name), context.inputs[1]))
    with pytest.raises(UsageError, match="would be rewritten"):
        asked.write(tmp_path / "bundle", contexts=[renamed])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../up", "a b", "", ".hidden", "a/b"])
def test_sample_ids_are_safe_folder_names(asked: BundleRequest, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be folder names"):
        asked.write(tmp_path / "bundle", samples=[replace(asked.samples[0], id=name)])


def test_tensors_must_fit_and_be_finite(asked: BundleRequest, tmp_path: Path) -> None:
    sample = asked.samples[0]
    small = {**sample.inputs, "latent": torch.zeros(1, 3, 4, 4)}
    with pytest.raises(UsageError, match="`inputs/gate-chelsea` do not fit"):
        asked.write(tmp_path / "bundle", samples=[replace(sample, inputs=small)])
    with pytest.raises(UsageError, match="`out_sample` of `expected/gate-chelsea` is not finite"):
        nan = {"out_sample": sample.fp32["out_sample"].log()}
        asked.write(tmp_path / "bundle", samples=[replace(sample, fp32=nan)])
    assert not list(tmp_path.iterdir())


def test_requests_that_do_not_hang_together_are_refused(asked: BundleRequest, tmp_path: Path) -> None:
    contexts, samples, out = asked.contexts, asked.samples, tmp_path / "bundle"
    with pytest.raises(UsageError, match="at least one compiled graph"):
        asked.write(out, contexts=[])
    with pytest.raises(UsageError, match="gate-china.*more than once"):
        asked.write(out, samples=[samples[1], samples[1]])
    with pytest.raises(UsageError, match=r"samples are for \[\], graphs are \['gate'\]"):
        asked.write(out, samples=[])
    with pytest.raises(UsageError, match=r"simulator outputs for \['SM8550'\]"):
        asked.write(out, contexts=contexts[:1])
    with pytest.raises(UsageError, match="`vae` has 0 contexts for SM8550"):
        asked.write(out, contexts=[*contexts, replace(contexts[0], graph="vae")])
    older = replace(contexts[0], info=replace(contexts[0].info, qairt="2.40.0.250101000000"))
    with pytest.raises(UsageError, match="QAIRT 2.40.0.250101000000 and 2.51.0"):
        asked.write(out, contexts=[older, contexts[1]])
    native = replace(contexts[0], outputs=(replace(contexts[0].outputs[0], dtype="uint16"),))
    with pytest.raises(UsageError, match="'out_sample': 'uint16'"):
        asked.write(out, contexts=[native, contexts[1]])
