"""How strongly the predicted noise answers to the text and to the control image, in one backend against another.

Errors that SQNR calls small can take away all of this: the answer to a prompt is a small part of the noise, and
guidance multiplies it. A quantized model may reach 40 dB and not hear its prompt.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from sdconvert.adapters import Tensors
from sdconvert.metrics import cosine
from sdconvert.pipelines.backend import GraphRunner

_HANDED_ON = {
    "down_block_res_sample": "down_block_additional_residuals",
    "mid_block_res_sample": "mid_block_additional_residual",
}
_GREY = 0.5


@dataclass(frozen=True)
class Response:
    """What a difference of inputs makes of the noise, compared with the same in fp32.

    Attributes:
        ratio: Length of the difference over fp32's; what this backend adds as noise lengthens it.
        gain: Its part along fp32's over fp32's: 1 where the answer is as strong, 0 where there is none.
        cosine: Of the two differences.
    """

    ratio: float
    gain: float
    cosine: float


def noise_differences(
    runners: Mapping[str, GraphRunner], calls: Iterable[Tensors], text: Tensor, no_text: Tensor
) -> dict[str, list[Tensor]]:
    """Change of the predicted noise by the text, and by the control image, for every call.

    Args:
        runners: Of `text_encoder`, `controlnet` and `unet`: named inputs in, named outputs out.
        calls: Inputs of the ControlNet's graph; their text is replaced.
        text: Token ids (1, tokens) of a prompt.
        no_text: Likewise of the empty one.

    Returns:
        `text`: noise with the prompt minus noise with the empty one; `control`: noise with the control image minus
        noise with a grey one; each (1, C, h, w) per call. An empty prompt has no `text`.
    """
    embeds, empty = (runners["text_encoder"]({"input_ids": ids})["last_hidden_state"] for ids in (text, no_text))
    asked = not torch.equal(text, no_text)
    differences: dict[str, list[Tensor]] = {"text": [], "control": []} if asked else {"control": []}
    for call in calls:
        grey = {"controlnet_cond": torch.full_like(call["controlnet_cond"], _GREY)}
        whole = predicted_noise(runners, call | {"encoder_hidden_states": embeds})
        differences["control"].append(whole - predicted_noise(runners, call | {"encoder_hidden_states": embeds} | grey))
        if asked:
            differences["text"].append(whole - predicted_noise(runners, call | {"encoder_hidden_states": empty}))
    return differences


def compare_responses(
    fp32: Mapping[str, list[Tensor]], found: Mapping[str, list[Tensor]]
) -> dict[str, list[dict[str, float]]]:
    """Compare `noise_differences` of two backends: per kind and call the fields of a `Response`."""
    return {
        kind: [asdict(_compare(one, other)) for one, other in zip(fp32[kind], found[kind], strict=True)]
        for kind in fp32
    }


def _compare(fp32: Tensor, found: Tensor) -> Response:
    reference, value = fp32.double().flatten(), found.double().flatten()
    length = reference.norm()
    return Response(
        ratio=float(value.norm() / length),
        gain=float(reference @ value / length**2),
        cosine=cosine(reference, value),
    )


def predicted_noise(runners: Mapping[str, GraphRunner], call: Tensors) -> Tensor:
    """The UNet's output behind its ControlNet, from the inputs of the latter's graph.

    Args:
        runners: Of `controlnet` and `unet`: named inputs in, named outputs out.
        call: Inputs of the ControlNet's graph.
    """
    residuals = {}
    for name, tensor in runners["controlnet"](call).items():
        own = next(mark for mark in _HANDED_ON if name.startswith(mark))
        residuals[name.replace(own, _HANDED_ON[own])] = tensor
    shared = {name: tensor for name, tensor in call.items() if name != "controlnet_cond"}
    return runners["unet"](shared | residuals)["out_sample"]
