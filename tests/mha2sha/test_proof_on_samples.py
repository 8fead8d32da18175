"""`sdconvert mha2sha --samples`: both forms of the model on inputs of its graph, and ranges per head from them."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from mha_folder import write_folder
from static_graphs import Case, shared_case, shared_simulation, simulate, vae_case

from sdconvert.calibration.store import ActivationWriter
from sdconvert.cli.app import main
from sdconvert.errors import QualityGateError
from sdconvert.io.files import read_json, sha256_folder
from sdconvert.io.tensors import load_tensors, save_tensors
from sdconvert.mha2sha.command import convert_folder
from sdconvert.mha2sha.proof_on_samples import proof_on_samples
from sdconvert.mha2sha.source import find_source


@pytest.fixture(autouse=True)
def _hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets it for its process."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def write_samples(folder: Path, case: Case) -> Path:
    writer = ActivationWriter(folder)
    for step, inputs in enumerate(case.samples):
        writer.add(inputs, picture="photograph", step=step, side="cond", tile=0)
    writer.close()
    return folder


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source with many heads, and inputs of its graph."""
    folder = tmp_path_factory.mktemp("controlnet")
    source = write_folder(folder / "mha", shared_case("small_controlnet"), shared_simulation("small_controlnet"))
    return source, write_samples(folder / "samples", shared_case("small_controlnet"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A smaller source, and inputs of its graph."""
    folder, case = tmp_path_factory.mktemp("vae"), vae_case()
    return write_folder(folder / "mha", case, simulate(case)), write_samples(folder / "samples", case)


def run(capsys: pytest.CaptureFixture[str], *arguments: object, form: str = "--json") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    with pytest.raises(SystemExit) as end:
        main([form, "mha2sha", *map(str, arguments)])
    code = end.value.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


def encodings(folder: Path) -> Any:
    return json.loads((folder / "controlnet.encodings").read_text())


def test_both_forms_are_compared_and_ranges_per_head_measured(
    controlnet: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, samples = controlnet
    before = sha256_folder(source)
    sha, mha = tmp_path / "sha", tmp_path / "mha"
    options = ("--rewrite", "linear_to_conv2d", "--activation-encodings", "recalibrate", "--samples", samples)
    code, out, _ = run(capsys, source, "-o", sha, *options)
    data = json.loads(out)
    assert code == 0
    assert sha256_folder(source) == before
    figures = read_json(sha / "sha_vs_mha.json")
    case = shared_case("small_controlnet")
    layers = {layer.path for layer in case.adapter.attention_layers()}
    assert figures.keys() == {*layers, *case.adapter.run(case.samples[0])}
    assert all(one["fp32_relative_error"] <= 1e-4 and one["quantized_db"] >= 50 for one in figures.values())
    worst = max(one["fp32_relative_error"] for one in figures.values())
    assert data["figures"]["worst_layer_fp32_relative_error"] == worst
    assert data["figures"]["fp32_relative_error"] <= min(worst, 1e-5)
    assert data["head_ranges"] == json.loads((sha / "head_ranges.json").read_text())
    assert data["head_ranges"]["output"]["recalibrate"] == data["figures"]["recalibrate_vs_fp32_db"]
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1"
    scales = [encodings(sha)["activation_encodings"][f"{layer}.to_q_convs.{n}"]["output"]["0"]["scale"] for n in (0, 1)]
    assert scales[0] != scales[1]
    # The parents' ranges are in heads.json.
    assert run(capsys, "--reverse", sha, "-o", mha)[0] == 0
    assert encodings(mha) == encodings(source)


def test_an_autoencoder_has_one_head_and_ranges_for_one_half(
    vae: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, samples = vae
    code, table, _ = run(capsys, source, "-o", tmp_path / "sha", "--samples", samples, form="--quiet")
    assert code == 0
    assert "quantized: SHA vs MHA, worst layer" in table
    figures = read_json(tmp_path / "sha" / "sha_vs_mha.json")
    assert figures.keys() == {"decoder.mid_block.attentions.0", "sample"}
    assert all(one["fp32_relative_error"] <= 1e-4 and one["quantized_db"] >= 50 for one in figures.values())
    # Ranges are the parents', as without samples.
    convert_folder(source, tmp_path / "plain")
    written = [(tmp_path / name / "vae_decoder.encodings").read_text() for name in ("sha", "plain")]
    assert written[0] == written[1]


def test_a_model_of_diffusers_has_no_ranges_and_is_compared_in_fp32(
    vae: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = vae_case().adapter.model
    assert isinstance(model, AutoencoderKL)
    model.half().save_pretrained(tmp_path / "vae", max_shard_size="20KB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 1
    code, out, _ = run(capsys, tmp_path / "vae", "-o", tmp_path / "sha", "--samples", vae[1])
    data = json.loads(out)
    assert code == 0
    assert data["figures"].keys() == {"fp32_relative_error", "worst_layer_fp32_relative_error"}
    assert data["unquantized"] == f"`{tmp_path / 'vae'}` holds no vae_decoder.encodings"


def test_a_conversion_that_computes_something_else_is_refused(vae: tuple[Path, Path], tmp_path: Path) -> None:
    source, samples = vae
    convert_folder(source, tmp_path / "sha")
    path = tmp_path / "sha" / "state_dict_sha.safetensors"
    weights = {key: tensor.clone() for key, tensor in load_tensors(path).items()}
    weights["decoder.mid_block.attentions.0.to_v_convs.0.weight"] *= 1.01
    save_tensors(weights, path)
    checked = proof_on_samples(find_source(source), samples, recalibrate=False)
    with pytest.raises(QualityGateError, match=r"vae_decoder: SHA differs from MHA by .*; 2 of 2 places differ"):
        checked.proof(tmp_path / "sha")


def test_encodings_of_another_kind_are_named_and_fp32_is_compared_all_the_same(
    vae: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "mha"
    shutil.copytree(vae[0], source)
    content = json.loads((source / "vae_decoder.encodings").read_text())
    del content["functional_encodings"]
    (source / "vae_decoder.encodings").write_text(json.dumps(content))
    code, out, _ = run(capsys, source, "-o", tmp_path / "sha", "--samples", vae[1])
    assert code == 0
    assert "do not fit the graph" in json.loads(out)["unquantized"]
    assert json.loads(out)["figures"].keys() == {"fp32_relative_error", "worst_layer_fp32_relative_error"}
    options = ("--samples", vae[1], "--activation-encodings", "recalibrate")
    code, out, _ = run(capsys, source, "-o", tmp_path / "own", *options)
    assert code == 2
    assert not (tmp_path / "own").exists()


def lose_config(source: Path, samples: Path) -> None:
    (source / "config.json").unlink()


def lose_ranges(source: Path, samples: Path) -> None:
    (source / "vae_decoder.encodings").unlink()


def enlarge(source: Path, samples: Path) -> None:
    case = vae_case()
    larger = [{name: tensor.repeat(1, 2, 1, 1) for name, tensor in inputs.items()} for inputs in case.samples]
    shutil.rmtree(samples)
    write_samples(samples, Case(case.adapter, case.call, larger))


def of_another_graph(source: Path, samples: Path) -> None:
    shutil.rmtree(samples)
    write_samples(samples, shared_case("small_controlnet"))


def damage_index(source: Path, samples: Path) -> None:
    (samples / "index.json").write_text('[{"id": 3}]')


def empty(source: Path, samples: Path) -> None:
    shutil.rmtree(samples)
    ActivationWriter(samples).close()


def as_they_are(source: Path, samples: Path) -> None:
    """Only the options are wrong."""


RECALIBRATE = ("--activation-encodings", "recalibrate")


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (as_they_are, RECALIBRATE, "there is nothing to measure them on"),
        (as_they_are, ("--samples", "samples", "--no-verify"), "--samples has no effect with --no-verify"),
        (as_they_are, ("--samples", "samples", "--reverse"), "--samples has no effect with --reverse"),
        (as_they_are, (*RECALIBRATE, "--reverse"), "--activation-encodings has no effect with --reverse"),
        (as_they_are, ("--samples", "nowhere"), "holds no calibration samples"),
        (lose_ranges, ("--samples", "samples", *RECALIBRATE), "holds no vae_decoder.encodings, so there are no ranges"),
        (lose_config, ("--samples", "samples", "--num-heads", "2"), "has no config.json beside it"),
        (enlarge, ("--samples", "samples"), "`latent_sample` is float32 [1, 8, 8, 8]; the vae_decoder graph of"),
        (of_another_graph, ("--samples", "samples"), "controlnet_cond are not those of the vae_decoder graph"),
        (damage_index, ("--samples", "samples"), "index.json` lists no samples"),
        (empty, ("--samples", "samples"), "holds no sample"),
    ],
)
def test_a_request_that_cannot_be_is_refused_and_nothing_is_written(
    vae: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    damage: Any,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, name in zip(vae, ("mha", "samples"), strict=True):
        shutil.copytree(folder, name)
    damage(Path("mha"), Path("samples"))
    code, out, err = run(capsys, "mha", "-o", "sha", *options)
    assert code == 2, err
    assert message in json.loads(out)["error"]["message"]
    assert json.loads(out)["error"]["hint"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mha", "samples"]
