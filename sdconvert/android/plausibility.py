"""Whether a time is in the order of what others have published for a graph of the same size on the same SoC.

Published: Qualcomm AI Hub, Stable Diffusion 1.5 and its Canny ControlNet, w8a16, 512 x 512, QNN context binary, QAIRT
2.42; `inference_time_milliseconds` in `qai_hub_models/models/{stable_diffusion_v1_5,controlnet_canny}/perf.yaml` of
https://github.com/quic/ai-hub-models (commit 52c080d). Between releases of the same table a UNet's time on one board
changed from 481 ms to 105 ms, so the band is wide: it finds a graph that ran on the CPU, not one that is 20 % too slow.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sdconvert.android.manifest import GraphRecord
from sdconvert.soc import find_soc

SOURCE = "Qualcomm AI Hub, SD1.5 w8a16 at 512 px, QAIRT 2.42"
_SLOW, _FAST = 3.0, 3.0
_SIZE = (0.6, 1.5)
"""Bytes of a context per weight at 8 bits; outside of this it is another model, or has other bits."""


@dataclass(frozen=True)
class _Published:
    parameters: float
    shapes: Mapping[str, tuple[int, ...]]
    """Of inputs, by what their names end with."""
    ms: Mapping[str, float]


_LATENT, _TEXT = (1, 4, 64, 64), (1, 77, 768)
_BY_GRAPH = {
    "unet": _Published(
        parameters=860e6,
        shapes={"sample": _LATENT, "encoder_hidden_states": _TEXT},
        ms={
            "QCS8550": 112.1,
            "SM8650": 79.1,
            "SM8750": 60.2,
            "SM8850": 44.8,
            "SM7750": 183.9,
            "SC8380XP": 112.9,
            "QCS9100": 105.0,
            "QCS8300": 262.5,
            "QCM6690": 2211.0,
        },
    ),
    "controlnet": _Published(
        parameters=361e6,
        shapes={"sample": _LATENT, "encoder_hidden_states": _TEXT},
        ms={
            "QCS8550": 83.7,
            "SM8650": 59.5,
            "SM8750": 46.1,
            "SM8850": 28.8,
            "SM7750": 124.4,
            "SC8380XP": 75.9,
            "QCS9100": 75.3,
            "QCS8300": 139.9,
            "QCM6690": 965.0,
        },
    ),
    "vae_decoder": _Published(
        parameters=49.5e6,
        shapes={"sample": _LATENT},
        ms={
            "QCS8550": 269.8,
            "SM8650": 203.2,
            "SM8750": 180.0,
            "SM8850": 116.9,
            "SM7750": 512.0,
            "SC8380XP": 264.0,
            "QCS9100": 250.0,
            "QCS8300": 725.0,
            "QCM6690": 6336.0,
        },
    ),
}


def doubt(graph: GraphRecord, context_bytes: int, soc: str, p50_ms: float) -> str:
    """Return what is doubtful about a time, or the empty string.

    Nothing is said of graphs that nobody has published: those of other inputs, of other sizes, on other SoCs.

    Args:
        graph: With its inputs.
        context_bytes: Size of its context, which tells how many weights of 8 bits it holds.
        soc: Name of the SoC.
        p50_ms: The median.
    """
    published = _BY_GRAPH.get(graph.name)
    if not published or not _is_that_graph(graph, published) or not _is_that_size(context_bytes, published):
        return ""
    reference = published.ms.get(find_soc(soc).soc_type)
    if reference is None:
        return ""
    told = f"`{graph.name}` took {p50_ms:.1f} ms; {reference:g} ms are published for {soc} ({SOURCE})"
    if p50_ms > _SLOW * reference:
        return f"{told}: {p50_ms / reference:.1f} times as long looks like work on the CPU, or a spill of VTCM"
    if p50_ms * _FAST < reference:
        return f"{told}: {reference / p50_ms:.1f} times as fast looks like a graph that does not do all of its work"
    return ""


def _is_that_graph(graph: GraphRecord, published: _Published) -> bool:
    found = {tensor.name: tensor.shape for tensor in graph.inputs}
    return all(
        any(name.endswith(ending) and shape == wanted for name, shape in found.items())
        for ending, wanted in published.shapes.items()
    )


def _is_that_size(context_bytes: int, published: _Published) -> bool:
    return _SIZE[0] <= context_bytes / published.parameters <= _SIZE[1]
