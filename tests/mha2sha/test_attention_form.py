"""`attention_form: mha`: the stage leaves every graph as it is, and the export takes the multi-head form."""

from pathlib import Path

from mha_folder import write_folder
from static_graphs import shared_case, shared_simulation

from sdconvert.artifacts import RunFolder
from sdconvert.config import load_recipe
from sdconvert.export.run import final_simulation
from sdconvert.mha2sha.artifact import Mha2ShaArtifact
from sdconvert.mha2sha.stage import Mha2ShaStage
from sdconvert.stages import StageContext


class Silent:
    def step(self, done: int, total: int, note: str = "") -> None:
        raise AssertionError("there is nothing to do")


def test_all_graphs_stay_in_their_multi_head_form(tmp_path: Path) -> None:
    recipe = load_recipe("pasd_tiny", ["mha2sha.attention_form=mha", "mha2sha.rewrites=[]"])
    run = RunFolder(tmp_path)
    out = run.stage_folder("40-mha2sha")
    out.mkdir()
    metrics = Mha2ShaStage().run(StageContext(recipe, out, run, Silent()))
    assert metrics == {"note": "attention stays in its multi-head form"}
    assert Mha2ShaArtifact(out).graphs() == []
    # What is exported next is the graph as it was quantized.
    quantized = run.stage_folder("30-quantize")
    quantized.mkdir()
    case, mha = shared_case("small_controlnet"), shared_simulation("small_controlnet")
    write_folder(quantized / "controlnet", case, mha)
    (quantized / "settings.json").write_text(mha.settings.model_dump_json())
    final = final_simulation(run, case.adapter, case.samples[0])
    assert final.encodings() == mha.encodings()
