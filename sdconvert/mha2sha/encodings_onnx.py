"""Activations keyed by tensors of an ONNX graph, `/mid_block/attn1/to_q/MatMul_output_0`.

The exporters write a module's path into the names of its tensors, with elements of lists as `to_out.0`; AIMET's
`sim.export` writes them as `to_out/to_out.0`, and the last tensor of a layer that is several as `to_out/0#1.end`.
Counters run per module there, so what is not in a rewritten module keeps its name in the SHA graph.

Other names (`17`, `linear_3`, `t.1`) come from counters of the whole graph. The SHA graph counts differently: such an
entry would land on another tensor, or none, and is left out, unless it is an input of the graph, which both forms have.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sdconvert.mha2sha.encodings_modules import ModuleMap

_TENSOR = re.compile(r"/(?:(?P<path>.+)/)?(?P<tensor>(?P<op>[A-Za-z][A-Za-z0-9]*)(?:_\d+)?)_output_\d+")
_END = re.compile(r"#\d+(\.end)?$")
_DOUBLED = re.compile(r"/([^/.]+)/\1\.\d+/")
_WHOLE_LAYER = ("Conv", "Gemm")

COUNTED = "its name is a count over the whole MHA graph; the SHA graph counts differently"
INSIDE = "the SHA graph computes this part of the layer head by head, in tensors of other names"
BEFORE_BIAS = "a convolution adds its bias itself: the SHA graph has no tensor before it"


@dataclass(frozen=True)
class LeftOut:
    """An entry that has no counterpart in the other form.

    Attributes:
        name: In the file.
        reason: Why.
    """

    name: str
    reason: str


class TensorNames:
    """Maps tensor names of an MHA graph to those of the SHA graph.

    Args:
        module_map: Of the modules.
        names: All tensor names of the file, from which its exporter's style is read.
        keys: All parameters of the MHA form.
        inputs: Of the graph.
    """

    def __init__(
        self, module_map: ModuleMap, names: Iterable[str], keys: Collection[str], inputs: Collection[str] = ()
    ) -> None:
        self._map = module_map
        self._keys = keys
        self._inputs = inputs
        self._doubled = any("#" in name or _DOUBLED.search(name) for name in names)

    def children(self, name: str) -> tuple[str, ...] | LeftOut:
        """Names of the tensors that stand for one; its own where nothing changes."""
        if name in self._inputs:
            return (name,)
        match = _TENSOR.fullmatch(name)
        if match is None:
            return LeftOut(name, COUNTED)
        path, ended = _module_path(match["path"] or "")
        parts = self._map.convolutions.get(path)
        if parts is None:
            return self._inside(name, path, match["tensor"]) if path in self._map.heads else (name,)
        op = match["op"]
        if not ended and op not in _WHOLE_LAYER and (op == "MatMul") == (f"{path}.bias" in self._keys):
            return LeftOut(name, BEFORE_BIAS)
        return tuple(f"/{self._written(part)}/Conv_output_0" for part in parts)

    def _inside(self, name: str, layer: str, tensor: str) -> tuple[str, ...] | LeftOut:
        """Softmax and the product with the values are the same tensors in every processor's graph."""
        heads = self._map.heads[layer].query
        stem = name.removesuffix(f"{tensor}_output_0")
        if tensor == "Softmax":
            return tuple(f"{stem}{_counted('Softmax', head)}" for head in range(heads))
        if tensor == "MatMul_1":
            products = [f"{stem}{_counted('MatMul', 2 * head + 1)}" for head in range(heads)]
            return (*products, f"{stem}{_counted('Concat', 0)}")
        return LeftOut(name, INSIDE)

    def _written(self, module: str) -> str:
        """A module's path as the exporter writes it."""
        segments: list[str] = []
        for atom in module.split("."):
            if not atom.isdigit() or not segments:
                segments.append(atom)
            elif self._doubled:
                segments.append(f"{segments[-1]}.{atom}")
            else:
                segments[-1] += f".{atom}"
        return "/".join(segments)


def module_of(name: str) -> str | None:
    """Path of the module that a tensor's name says, if it says one."""
    match = _TENSOR.fullmatch(name)
    return module_path(match["path"] or "") if match else None


def module_path(written: str) -> str:
    """A module's path with dots, from an exporter's spelling: `/net/net.2`, `/net/2#1.end` and `net.2` are one."""
    return _module_path(written.removeprefix("/"))[0]


def _counted(op: str, index: int) -> str:
    return f"{op}_{index}_output_0" if index else f"{op}_output_0"


def _module_path(path: str) -> tuple[str, bool]:
    """A module's path with dots, and whether the name says that the tensor is the last of its layer."""
    atoms: list[str] = []
    for segment in path.removesuffix("/marked_module").split("/"):
        atom = _END.sub("", segment)
        if atoms and re.fullmatch(rf"{re.escape(atoms[-1])}(\.\d+)+", atom):
            atoms.pop()
        atoms.append(atom)
    return ".".join(atoms), bool(_END.search(path))
