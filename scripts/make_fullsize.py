"""Write PASD at the size of Stable Diffusion 1.5 with random weights, for tests of speed and memory.

python scripts/make_fullsize.py build/fullsize [--graph unet|controlnet] [--form diffusers|safetensors|pth]
    [--dtype float32|float16|bfloat16] [--seed 0] [--channels 320 640 1280 1280]

The UNet has 1,107,755,524 parameters (4.4 GB in float32), the ControlNet 361,289,497. Each graph gets a folder
`<OUT>/<graph>` with `config.json` and, by form, `diffusion_pytorch_model.safetensors`, `state_dict_mha.safetensors`
or `state_dict_mha.pth`. Tensors are made and written one after another.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdconvert.io.files import atomic_file, atomic_folder, write_json_atomic
from sdconvert.io.safetensors_file import safetensors_header
from sdconvert.io.stored_tensor import ByteRange, contiguous
from sdconvert.io.weights_index import read_index
from sdconvert.mha2sha.state_dict import split_weights
from sdconvert.models.pasd import build_pasd

GRAPHS = ("unet", "controlnet")
FORMS = {
    "diffusers": "diffusion_pytorch_model.safetensors",
    "safetensors": "state_dict_mha.safetensors",
    "pth": "state_dict_mha.pth",
}
DTYPES = ("float32", "float16", "bfloat16")
SD15: Mapping[str, Any] = {
    "attention_head_dim": 8,  # diffusers means the number of heads
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
}


def fullsize_shapes(graph: str, sizes: Mapping[str, Any] = SD15) -> dict[str, tuple[int, ...]]:
    """Shapes of a graph's parameters by name; the first axis counts rows."""
    return _shapes(_models(sizes)[graph])


def write_fullsize(
    folder: Path, graph: str, form: str, dtype: str = "float32", seed: int = 0, sizes: Mapping[str, Any] = SD15
) -> Path:
    """Write one graph's folder, whole or not at all.

    Args:
        folder: To write.
        graph: One of `GRAPHS`.
        form: One of `FORMS`.
        dtype: Of all tensors.
        seed: Gives, with a tensor's name, its values.
        sizes: Keys of the configs.

    Returns:
        The weights file.
    """
    model = _models(sizes)[graph]
    with atomic_folder(folder) as partial:
        write_json_atomic(json.loads(model.to_json_string()), partial / "config.json")
        name = FORMS[form]
        written = partial / Path(name).with_suffix(".safetensors")
        _write_safetensors(written, _shapes(model), dtype, seed)
        if form == "pth":
            split_weights(read_index(written), [], partial, Path(name).stem, ".pth")
            written.unlink()
    return folder / name


def values(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random values of the scale that training leaves: weights of variance 1 / fan-in, norms around one."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    random = torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1))
    if len(shape) > 1:
        return random.mul_(prod(shape[1:]) ** -0.5)
    return random.mul_(0.02).add_(1.0 if name.endswith("weight") else 0.0)


def _models(sizes: Mapping[str, Any]) -> dict[str, Any]:
    with torch.device("meta"):
        return dict(zip(GRAPHS, build_pasd(sizes, sizes), strict=True))


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, seed: int) -> None:
    nowhere = ByteRange(path, 0, 0)
    header, stored = safetensors_header(
        [contiguous(name, dtype, shape, nowhere) for name, shape in shapes.items()], {"format": "pt"}
    )
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for tensor in stored:
            made = values(tensor.name, tensor.shape, seed).to(getattr(torch, dtype))
            file.write(made.view(torch.uint8).numpy().data)


def main() -> None:
    """Write the graphs that the command line asks for, and print their files."""
    parser = argparse.ArgumentParser(description="Write PASD at full size with random weights.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--graph", choices=GRAPHS, help="default: both")
    parser.add_argument("--form", choices=FORMS, default="diffusers")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--channels", type=int, nargs=4, default=SD15["block_out_channels"], help="of the four levels")
    given = parser.parse_args()
    sizes = {**SD15, "block_out_channels": tuple(given.channels)}
    for graph in [given.graph] if given.graph else GRAPHS:
        path = write_fullsize(given.out / graph, graph, given.form, given.dtype, given.seed, sizes)
        print(f"{path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
