"""A folder as the quantize stage leaves it, for one graph."""

import json
from pathlib import Path

from static_graphs import Case

from sdconvert.io.encodings import write_encodings, write_params
from sdconvert.io.tensors import save_tensors
from sdconvert.quantize.files import to_sections
from sdconvert.quantize.simulation import Simulation


def write_folder(folder: Path, case: Case, simulation: Simulation, suffix: str = "safetensors") -> Path:
    """What the quantize stage writes for one graph."""
    folder.mkdir()
    graph = case.adapter.graph_name
    save_tensors(case.adapter.model.state_dict(), folder / f"state_dict_mha.{suffix}")
    sections = to_sections(simulation)
    write_params(folder / "parameters_mha.encodings", sections["param_encodings"])
    write_encodings(folder / f"{graph}.encodings", sections)
    (folder / "config.json").write_text(json.dumps(case.adapter.config()))
    return folder
