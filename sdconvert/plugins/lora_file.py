"""LoRA files: the key styles that are in use, read into one form.

    style       key                                                                         parts
    diffusers   unet.down_blocks.0.attentions.0.….attn1.to_q.lora_A.weight                  lora_A, lora_B
    diffusers   unet.….attn1.to_q.lora.down.weight; text_encoder.….lora_linear_layer.…      down, up
    diffusers   ….attn1.processor.to_q_lora.down.weight                                     down, up
    kohya       lora_unet_down_blocks_0_attentions_0_…_attn1_to_q.lora_down.weight          lora_down, lora_up, alpha

A kohya file gives an alpha per layer; diffusers gives one in the file's metadata; without either, alpha is the rank.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdconvert.errors import CheckpointError
from sdconvert.io.tensors import load_tensors, read_metadata

_METADATA = "lora_adapter_metadata"
_PART = re.compile(
    r"""(?P<stem>.+?)
    (?:
        \.lora_(?P<peft>[AB])\.weight
      | \.lora_(?P<kohya>down|up)\.weight
      | (?:\.lora_linear_layer\.|\.lora\.|_lora\.)(?P<diffusers>down|up)\.weight
      | \.(?P<alpha>alpha)
    )$""",
    re.VERBOSE,
)
_KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_controlnet_": "controlnet",
}
_COMPONENTS = ("unet", "controlnet", "text_encoder", "text_encoder_2")
_SHOWN = 10


@dataclass(frozen=True)
class LowRankUpdate:
    """What a file has for one layer.

    Attributes:
        component: The model: `unet`, `controlnet`, `text_encoder`; empty if the file does not say.
        layer: Path of the layer there; with `_` for every `.` if `underscored`.
        underscored: The file is kohya's.
        down: (rank, in) or (rank, in, height, width).
        up: (out, rank) or (out, rank, 1, 1).
        alpha: Weight of the product before its division by the rank.
        keys: As they stand in the file.
    """

    component: str
    layer: str
    underscored: bool
    down: Tensor
    up: Tensor
    alpha: float
    keys: tuple[str, ...]


def read_lora(path: Path) -> list[LowRankUpdate]:
    """Read a LoRA file of any of these styles, in float32.

    Raises:
        CheckpointError: The file is missing or damaged, holds no LoRA, or keys that are of none of the styles or
            lack their counterpart; the message lists them.
    """
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    strange = []
    for key, tensor in load_tensors(path, dtype=torch.float32).items():
        match = _PART.match(key)
        if match is None:
            strange.append(key)
            continue
        role = {"A": "down", "B": "up"}.get(match["peft"], match["kohya"] or match["diffusers"] or "alpha")
        parts.setdefault(match["stem"], {})[role] = (key, tensor)
    for found in parts.values():
        if not {"down", "up"} <= found.keys():
            strange += [key for key, _ in found.values()]
    if strange or not parts:
        raise CheckpointError(
            f"`{path}` holds {len(strange)} keys that are no LoRA: {listed(strange)}"
            if strange
            else f"`{path}` holds no tensors",
            hint="LoRAs in the key style of diffusers or kohya are read; LoHa, LoKr, DoRA and Tucker factors are not",
        )
    alphas = _Alphas(path)
    return [_update(stem, found, alphas) for stem, found in parts.items()]


def _update(stem: str, found: dict[str, tuple[str, Tensor]], alphas: "_Alphas") -> LowRankUpdate:
    (_, down), (_, up) = found["down"], found["up"]
    keys = tuple(key for key, _ in found.values())
    prefix = next((prefix for prefix in _KOHYA if stem.startswith(prefix)), None)
    if prefix:
        component, layer = _KOHYA[prefix], stem.removeprefix(prefix)
    else:
        first, _, rest = stem.removeprefix("base_model.model.").partition(".")
        component, layer = (first, rest) if first in _COMPONENTS else ("", f"{first}.{rest}".strip("."))
        # diffusers' first LoRAs were attention processors beside the projections that they changed.
        layer = layer.replace(".processor.", ".")
    alpha = float(found["alpha"][1]) if "alpha" in found else alphas.of(component, layer, rank=up.shape[1])
    return LowRankUpdate(component, layer, prefix is not None, down, up, alpha, keys)


class _Alphas:
    """The alphas that diffusers writes into a file's metadata: PEFT's configuration by component."""

    def __init__(self, path: Path) -> None:
        text = read_metadata(path).get(_METADATA, "{}")
        try:
            config: Any = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"`{path}`: its {_METADATA} is no JSON", hint="save the LoRA again") from error
        self._config: dict[str, Any] = config if isinstance(config, dict) else {}
        for key in self._config:
            if key.endswith("use_dora") and self._config[key]:
                raise CheckpointError(f"`{path}` is a DoRA, not a LoRA", hint="merge it where it was trained")

    def of(self, component: str, layer: str, rank: int) -> float:
        alpha = self._get(component, "lora_alpha", rank)
        for pattern, value in self._get(component, "alpha_pattern", {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                alpha = value
                break
        # Rank-stabilized LoRA divides by the root of the rank; what reads this divides by the rank.
        return float(alpha) * (rank**0.5 if self._get(component, "use_rslora", False) else 1.0)

    def _get(self, component: str, name: str, default: Any) -> Any:
        value = self._config.get(f"{component}.{name}" if component else name)
        return default if value is None else value


def listed(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
