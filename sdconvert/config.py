"""The recipe: everything that a run may be told, as frozen models that refuse what they do not know.

The string under a field is its documentation; `sdconvert config schema` shows it. This file imports no torch, so that
a mistyped recipe is refused at once.
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from sdconvert.errors import RecipeError, UsageError
from sdconvert.models.rewrite_names import REWRITES, RewriteName

RECIPES = Path(__file__).parent / "recipes"


# No text, PASD's own additions for the better and for the worse, and what photographs show.
_PROMPTS = (
    "clean, high-resolution, 8k",
    "",
    "a photo of a smiling woman in front of a flag, clean, high-resolution, 8k",
    "a cup of coffee on a wooden table, best quality",
    "blurry, dotted, noise, raster lines, unclear, lowres, over-smoothed",
    "a rocket on its launch pad under a blue sky",
    "a photo of a red flower among green leaves, clean, high-resolution, 8k",
    "an old building beside a road at night, extremely detailed",
)


GraphName = Literal["text_encoder", "vae_encoder", "controlnet", "unet", "vae_decoder"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class LoraSection(_Section):
    """One LoRA file."""

    path: str
    """A `.safetensors` file in the key style of diffusers or kohya."""
    scale: float = 1.0
    """Weight of the whole file; not zero."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.scale == 0:
            raise ValueError(f"a scale of 0 gives {self.path} no effect; leave it out")
        return self


class CheckpointSection(_Section):
    """What is converted."""

    path: str = "asset:pasd_tiny"
    """A diffusers folder, or `asset:NAME` for a model that ships with sdconvert."""
    loras: tuple[LoraSection, ...] = ()
    """LoRA files that are fused into UNet, ControlNet and text encoder before anything else, in this order."""


class PipelineSection(_Section):
    """How the model samples, in calibration, evaluation and report alike."""

    num_inference_steps: int = Field(default=4, ge=1)
    """Denoising steps of the sampler."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance; 1 runs the model once per step, anything else twice."""
    conditioning_scale: float = Field(default=1.0, ge=0)
    """Weight of the ControlNet's residuals."""
    prompt: str = "clean, high-resolution, 8k"
    """What the picture should be."""
    negative_prompt: str = "blurry, dotted, noise, raster lines, unclear, lowres, over-smoothed"
    """What it should not be; has a say only with guidance."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial noise and of the degradation."""
    upscale: int = Field(default=4, ge=1)
    """Factor from the low-resolution picture to the result."""
    latent_tile: int = Field(default=32, ge=8)
    """Side of the square latent tile that one graph sees, in latent pixels."""
    latent_overlap: int = Field(default=8, ge=0)
    """Overlap of neighbouring tiles, in latent pixels."""
    color_fix: bool = True
    """Take the colours from the enlarged input, as PASD does: normalization loses a tile's mean, the input has it."""

    @model_validator(mode="after")
    def _tiles_advance(self) -> Self:
        if self.latent_overlap >= self.latent_tile:
            raise ValueError(
                f"latent_overlap {self.latent_overlap} must be smaller than latent_tile {self.latent_tile}"
            )
        return self


class CalibrationSection(_Section):
    """Which photographs the ranges are measured on, and which ones the result is judged on."""

    photographs: tuple[str, ...] = Field(default=("astronaut", "coffee", "rocket", "flower"), min_length=1)
    """Photographs that ship with sdconvert, by name, or paths of pictures."""
    crops_per_photograph: int = Field(default=2, ge=1)
    """Random crops of one tile taken from each photograph."""
    prompts: tuple[str, ...] = Field(default=_PROMPTS, min_length=1)
    """Prompts of the crops, in turn, as many as there are crops: ranges that one text shows do not hold for the next.
    What is evaluated has `pipeline.prompt`."""
    held_out: tuple[str, ...] = Field(default=("chelsea", "china"), min_length=1)
    """Photographs for evaluation and report; none of them may calibrate."""
    memory_limit: ByteSize | None = None
    """Weights that may be in memory at once, as `4GiB` or in bytes; the smallest possible share if not given."""

    @model_validator(mode="after")
    def _held_out_is_held_out(self) -> Self:
        if both := set(self.photographs) & set(self.held_out):
            raise ValueError(f"{', '.join(sorted(both))} stands in both photographs and held_out")
        return self


class AdaRoundSection(_Section):
    """How AdaRound rounds weights."""

    solver: Literal["coordinate", "adaround"] = "coordinate"
    """`coordinate`: GPTQ between each weight's two neighbours, then coordinate descent; `adaround`: Adam on soft
    rounding as AIMET does it, then coordinate descent."""
    inputs: Literal["sequential", "fp"] = "sequential"
    """`sequential`: a layer makes up for what the layers before it have lost; `fp`: every layer by itself."""
    quantized_activations: bool = False
    """Layers see quantized activations too; AIMET's AdaRound leaves them in floating point."""
    refit_scale: bool = False
    """Fit each output channel's scale to its codes."""
    correct_bias: bool = True
    """Have each layer's bias make up for the mean of its output's error (Nagel et al., 2019); AIMET's AdaRound leaves
    biases alone."""
    reconstruct: Literal["block", "layer+activation"] | None = None
    """Train the rounding of whole blocks, or of layers with the activation behind them, once each layer has its own
    (BRECQ, Li et al., 2021); with `quantized_activations` as QDrop does it (Wei et al., 2022)."""
    samples: int | None = Field(default=None, ge=1)
    """Calibration samples to use, spread evenly over timesteps and pictures; all of them if not given."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of the samples that choose the damping and have the last word against rounding to nearest."""
    memory_limit: ByteSize = ByteSize(1 << 30)
    """Memory beside the program and the weights, as `1GiB` or in bytes; the rest goes to disk."""


class LayerPrecision(_Section):
    """Weights of some layers."""

    weight_bitwidth: Literal[4, 8, 16]
    """Bits per weight."""
    block_size: int | None = Field(default=None, ge=2)
    """Input channels that share a scale, in each output channel; all of them if not given."""


class RangeEstimator(_Section):
    """How a range of activations follows from what calibration shows."""

    estimator: Literal["min_max", "percentile", "mse"] = "min_max"
    """`min_max` clips nothing that was seen and adds a margin at 16 bits, `percentile` clips the tails, `mse` seeks the
    least error of rounding and clipping together."""
    percentile: float | None = Field(default=None, gt=50, lt=100)
    """Percentage of values below the upper end, and as many above the lower; only for `percentile`."""

    @model_validator(mode="after")
    def _has_its_number(self) -> Self:
        if (self.percentile is None) == (self.estimator == "percentile"):
            what = "needs a percentile, as 99.99" if self.percentile is None else "takes no percentile"
            raise ValueError(f"estimator {self.estimator} {what}")
        return self


class QuantizeSection(_Section):
    """Bit widths and rounding of the quantized model."""

    weight_bitwidth: Literal[4, 8, 16] = 8
    """Bits per weight of convolutions and linear layers."""
    activation_bitwidth: Literal[8, 16] = 16
    """Bits per activation."""
    per_channel: bool = True
    """One weight scale per output channel instead of one per tensor."""
    layers: dict[str, LayerPrecision] = {}
    """Convolutions and linear layers with weights of another precision: `{PATTERN: {weight_bitwidth: 4}}`. A pattern is
    a module path in the model's own names, or as in a shell (`*` also stands for dots); with the name of a graph before
    it, for that graph alone: `unet:up_blocks.*.ff.*`. The last pattern that fits a layer counts."""
    ranges: dict[str, RangeEstimator] = {"default": RangeEstimator()}
    """How ranges of activations are taken, by the op that makes the tensor (`conv2d`, `linear`, `matmul`, `add`,
    `layer_norm`, …; `input`, `constant`, `matmul_second_operand`) and `default` for all others."""
    adaround: AdaRoundSection | None = None
    """Choose the rounding of the weights by what it does to each layer's output (Nagel et al., "Up or Down?", 2020)
    instead of rounding to nearest; `true` stands for all defaults."""

    @field_validator("adaround", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: {}, False: None}.get(value, value) if isinstance(value, bool) else value


class Mha2ShaSection(_Section):
    """How attention is split into single heads."""

    attention_form: Literal["sha", "mha"] = "sha"
    """`sha` splits attention into heads; `mha` leaves all graphs as they are, for comparison, and takes no rewrites."""
    activation_encodings: Literal["inherit", "recalibrate"] = "inherit"
    """`inherit` gives every head the ranges measured for the whole attention, `recalibrate` its own."""
    rewrites: tuple[RewriteName, ...] = REWRITES
    """What else is rewritten for the NPU beside attention per head; none of it changes what the model computes."""
    fold_scale: bool = False
    """Multiply the scale of attention's scores into the weights of the queries: one multiplication less per head."""

    @model_validator(mode="after")
    def _all_has_an_effect(self) -> Self:
        if self.attention_form == "mha":
            if self.rewrites:
                raise ValueError("with attention_form mha rewrites have no effect: set rewrites to []")
            if self.fold_scale or self.activation_encodings == "recalibrate":
                raise ValueError("with attention_form mha neither fold_scale nor activation_encodings has an effect")
        return self


class ExportSection(_Section):
    """The ONNX files."""

    opset: int = Field(default=21, ge=21)
    """ONNX operator set; 16-bit Q/DQ needs 21."""
    targets: tuple[Literal["qdq_onnx", "qnn_context", "onnx_encodings", "dlc"], ...] = ("qdq_onnx", "qnn_context")
    """The road's own two, and for users of the QAIRT SDK `onnx_encodings` (a graph without Q/DQ nodes and its encodings
    file, in `50-export`) and `dlc` (beside each context)."""
    split: dict[GraphName, Annotated[tuple[str, ...], Field(min_length=1)]] = {}
    """Graphs that are too large for one context, and the blocks before which they are cut; each part gets a context of
    its own, and they run one after another. A block that does not exist is answered with those that do."""
    keys_as_rows: bool = True
    """Leave the transposition of attention's keys to the product with the queries: one Transpose less per head."""

    @field_validator("targets")
    @classmethod
    def _with_the_road_s_own(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if missing := {"qdq_onnx", "qnn_context"} - set(targets):
            raise ValueError(f"the road goes through {' and '.join(sorted(missing))}: add to them, do not replace them")
        return targets


class QnnSection(_Section):
    """Compilation for the Hexagon NPU."""

    socs: tuple[str, ...] = Field(default=("SM8650",), min_length=1)
    """Target systems-on-chip; each gets its own context binaries."""
    finalization_mode: Literal[2, 3] = 3
    """Effort of the HTP compiler: 3 searches longest."""
    fidelity: tuple[GraphName, ...] = ("controlnet", "unet")
    """Graphs whose blocks are also compiled and simulated one by one: fp32, quantized model, ONNX Runtime and HTP."""


class GatesSection(_Section):
    """Figures below which a run fails with exit code 4."""

    simulator_vs_fp32_db: float = 35.0
    """SQNR in dB of each graph's outputs in the HTP simulator against fp32."""
    simulator_vs_quantized_db: float = 45.0
    """SQNR in dB of the same outputs against the quantized torch model, on v73 and later."""
    simulator_vs_quantized_before_v73_db: float = 40.0
    """The same on v68 and v69, which multiply with second operands of 8 bits and agree less."""
    block_simulator_vs_quantized_db: float = 50.0
    """SQNR in dB of each block's outputs in the HTP simulator against the quantized torch model, from the same inputs,
    on v73 and later; for the graphs in `qnn.fidelity`."""
    block_simulator_vs_quantized_before_v73_db: float = 38.0
    """The same on v68 and v69."""
    response_tolerance: float = Field(default=0.05, gt=0)
    """How far the strength of the answer to the prompt, and to the control image, may be from fp32's: 0.05 allows 0.95
    to 1.05 times the change of the predicted noise, in the HTP simulator."""
    image_psnr_db: float = 38.0
    """PSNR in dB (data range 1) of the quantized model's final picture against the fp32 one."""

    def key_of(self, measure: str, arch: int) -> str:
        """Return the key of the gate that holds a measure, such as `simulator_vs_fp32_db`, on v`arch` of the NPU."""
        before = f"{measure.removesuffix('_db')}_before_v73_db"
        return before if arch < 73 and before in type(self).model_fields else measure


class ReportSection(_Section):
    """What the report tells beside what the stages found."""

    sensitivity: str | None = None
    """A file of `sdconvert quantize sensitivity`: the report then shows size against quality. `quantize recipe` writes
    it here."""
    bench: str | None = None
    """A result of `sdconvert bench` of this recipe's bundle: the report then shows the graphs on the device."""


class Recipe(_Section):
    """One conversion, from checkpoint to bundle."""

    schema_version: Literal[1] = 1
    """Version of this format."""
    name: str = Field(default="pasd_tiny", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run folder below the build folder."""
    checkpoint: CheckpointSection = CheckpointSection()
    pipeline: PipelineSection = PipelineSection()
    calibration: CalibrationSection = CalibrationSection()
    quantize: QuantizeSection = QuantizeSection()
    mha2sha: Mha2ShaSection = Mha2ShaSection()
    export: ExportSection = ExportSection()
    qnn: QnnSection = QnnSection()
    gates: GatesSection = GatesSection()
    report: ReportSection = ReportSection()


def load_recipe(path_or_name: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply overrides to it.

    Args:
        path_or_name: A YAML file, or the name of a recipe that ships with sdconvert.
        overrides: `section.key=value` each, the value in YAML.

    Raises:
        RecipeError: No such recipe, no YAML, an unknown or repeated key, a value out of range; the message says where.
    """
    path = _find(path_or_name)
    content, origins = _parse(path)
    for override in overrides or []:
        _override(content, origins, override)
    try:
        # As JSON, strict mode takes lists for tuples, and still no text for numbers.
        return Recipe.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0], origins, path) from error


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe with every default filled in, as YAML that `load_recipe` reads."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def parse_size(text: str, option: str) -> int:
    """Read an amount of bytes such as `300MiB`.

    Raises:
        UsageError: It is none; the message names the option.
    """
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise UsageError(f"{option} {text} is no amount of bytes", hint="write 4GiB, 300MiB or a number") from error


def did_you_mean(wrong: str, known: list[str]) -> str:
    """Return a hint that names the nearest known words, or all of them where none is near."""
    near = difflib.get_close_matches(wrong, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(f'`{word}`' for word in near)}?" if near else f"known: {', '.join(known)}"


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(f"recipe `{path}` does not exist", hint="check the path, or give a name without suffix")
        return path
    known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    if str(path_or_name) not in known:
        raise RecipeError(f"no recipe is called `{path_or_name}`", hint=did_you_mean(str(path_or_name), known))
    return RECIPES / f"{path_or_name}.yaml"


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a mapping and remember where each dotted key stands."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"`{path}` is no valid YAML: {error}", hint="check indentation and colons") from error
    if not isinstance(content, dict):
        raise RecipeError(f"`{path}` holds no mapping", hint="see `sdconvert config show` for a complete recipe")
    origins: dict[str, str] = {}
    for key, node in _keys(root, ""):
        place = f"`{path}` line {node.start_mark.line + 1}"
        if key in origins:
            raise RecipeError(f"{place}: `{key}` is given twice", hint=f"it stands already in {origins[key]}")
        origins[key] = place
    return content, origins


def _keys(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key
            yield from _keys(value, f"{name}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _keys(item, f"{prefix}{index}.")


def _override(content: dict[str, Any], origins: dict[str, str], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *sections, key = dotted.strip().split(".")
    if not equals or not key:
        raise RecipeError(f"`--set {override}` is no assignment", hint="write --set section.key=value")
    for section in sections:
        if content.get(section) in (None, True):  # a section that is optional, or on with all defaults
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise RecipeError(f"`--set {override}`: `{section}` is no section", hint="see `sdconvert config show`")
    try:
        content[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"`--set {override}`: the value is no YAML", hint="quote it as in a YAML file") from error
    origins[dotted.strip()] = f"`--set {override}`"


def _explain(error: ErrorDetails, origins: dict[str, str], path: Path) -> RecipeError:
    names = [str(part) for part in error["loc"]]
    dotted = ".".join(names)
    # A bad list element or a section's own check stands where its nearest named parent stands.
    places = (origins.get(".".join(names[:length])) for length in range(len(names), 0, -1))
    place = next((found for found in places if found), f"`{path}`")
    if error["type"] != "extra_forbidden":
        found = "" if isinstance(error["input"], dict) else f", found {error['input']!r}"
        message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
        return RecipeError(f"{place}: `{dotted}`: {message}{found}", hint="see `sdconvert config schema`")
    everywhere = {key.rpartition(".")[2]: key for key in _all_keys(Recipe)}
    *parents, wrong = names
    section: Any = Recipe
    for parent in parents:
        # Below a list or a mapping the parent is an index or a key, and the section is what stands there.
        held = [one for one in get_args(section) if isinstance(one, type) and issubclass(one, BaseModel)]
        section = held[0] if held else section.model_fields[parent].annotation
    hint = did_you_mean(wrong, list(section.model_fields))
    if wrong in everywhere:
        hint = f"did you mean `{everywhere[wrong]}`?"
    return RecipeError(f"{place}: unknown key `{dotted}`", hint=hint)


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
