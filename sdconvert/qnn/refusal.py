"""Why the HTP compiler refused a graph: its log, read for the user.

ONNX Runtime's exception says only that nodes are "assigned to the default CPU EP"; names and reasons are in the log.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from sdconvert.errors import CompileError, SdconvertError
from sdconvert.io.files import disk_full
from sdconvert.soc import Soc

_REFUSED = re.compile(r"\{ name: (?P<name>.*?), type: (?P<type>\w+) \}")
# ONNX Runtime names a node anew when it turns it to channels last.
_RENAMED = re.compile(r"_token_\d+$")
_REASONS = re.compile(
    r"(?:QNN SetupBackend failed .*|.*Failed to (?:finalize|compose|create context).*|.*QNN_[A-Z_]*ERROR.*)"
)
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_NAMED_AT_MOST = 8
_WRAPPERS = {"QuantizeLinear", "DequantizeLinear"}

_HINTS = {
    # Alone it is never the culprit: the operator that it feeds was not taken as a quantized one.
    "DequantizeLinear": "look at the operator that it feeds: input and output must be both signed or both unsigned; "
    "int16 belongs into a pair of its own before a MatMul",
    "Resize": "give it a static shape and keep Q/DQ away from its `scales` and `sizes`",
    "LayerNormalization": "quantize its weight as uint8 or uint16, not int8, when activations are 16-bit",
    "InstanceNormalization": "quantize its weight and give it an int32 bias",
    "MatMul": "check the second operand: 16-bit symmetric needs V73 or later",
    "Conv": "weights as signed 8-bit per channel with 16-bit activations; per-channel asymmetric is not taken",
}


def explain_refusal(status: int, log: Path, onnx: Path, soc: Soc) -> SdconvertError:
    """Make the error for a compile that ended with exit code `status` and left `log`."""
    text = _ESCAPES.sub("", log.read_text(encoding="utf-8", errors="replace"))
    if status < 0:
        return CompileError(
            f"the compiler of `{onnx.name}` for {soc.name} was killed by signal {-status}",
            hint=f"signal 9 means out of memory most of the time; the log is {log}",
        )
    if "Failed to write context cache file" in text:
        return disk_full(log.parent)
    # The list is logged once per partitioning pass, so every node is there more than once.
    names = ((match["type"], _RENAMED.sub("", match["name"])) for match in _REFUSED.finditer(text))
    refused = dict.fromkeys(names)
    operators = [node for node in refused if node[0] not in _WRAPPERS] or list(refused)
    if operators:
        from sdconvert.export.artifact import origins

        places = {name: str(origin) for name, origin in origins(onnx, [name for _, name in operators]).items()}
        message = f"{soc.name} refuses {_named(operators, places)} in `{onnx.name}`"
        return CompileError(message, hint=_hint(operators, places, log))
    reasons = list(dict.fromkeys(line.split("] ")[-1].strip() for line in _REASONS.findall(text)))
    reason = reasons[0] if reasons else next((x for x in reversed(text.splitlines()) if x.strip()), "no message")
    return CompileError(f"the compiler failed on `{onnx.name}` for {soc.name}: {reason}", hint=f"the log is {log}")


def _named(nodes: list[tuple[str, str]], places: Mapping[str, str]) -> str:
    shown = ", ".join(
        " ".join(filter(None, [kind, f"`{name}`" if name else "", places.get(name)]))
        for kind, name in nodes[:_NAMED_AT_MOST]
    )
    rest = Counter(kind for kind, _ in nodes[_NAMED_AT_MOST:])
    more = "".join(f", {count} more {kind}" for kind, count in rest.items())
    return f"{len(nodes)} {'node' if len(nodes) == 1 else 'nodes'} ({shown}{more})"


def _hint(nodes: list[tuple[str, str]], places: Mapping[str, str], log: Path) -> str:
    hints = [_HINTS[kind] for kind in dict.fromkeys(kind for kind, _ in nodes) if kind in _HINTS]
    for kind, name in nodes:
        if kind not in _HINTS:
            where = f" {places[name]}" if name in places else ""
            hints.append(f"compute the {kind}{where} with ops that HTP takes, or leave it outside of the graph")
            break
    return f"{'; '.join(hints)}; the log is {log}"
