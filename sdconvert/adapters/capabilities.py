"""What sdconvert can do with a model family, and the check of a recipe's requests against it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from sdconvert.errors import CapabilityError

Request = bool | int
_GUIDANCE_SIDES = 2


@dataclass(frozen=True)
class AdapterCapabilities:
    """What works for a family."""

    quantize: bool = False
    """Its graph can be quantized, and exported with Q/DQ nodes."""
    mha2sha: bool = False
    """Its attention can be split into single heads."""
    adaround: bool = False
    """The rounding of its weights can be learned block by block."""
    cfg_split: bool = False
    """The two sides of guidance are two runs of one graph, and so may be two processes (`cfg_degree` 2)."""
    block_parallel: bool = False
    """Its blocks may be divided among processes (`pipeline_parallel_degree`)."""

    def violations(self, requests: Mapping[str, Request], blocks: int | None = None) -> Iterator[str]:
        """What of the requests cannot be had, one text each.

        Args:
            requests: Truth values by name of a capability; `cfg_degree` and `pipeline_parallel_degree` are numbers.
            blocks: How many blocks the model has, if that is known.

        Raises:
            CapabilityError: A request is none that a capability stands for, or of the wrong kind.
        """
        known: dict[str, Request] = {field.name: getattr(self, field.name) for field in fields(self)}
        degrees = {
            "cfg_degree": ("cfg_split", _GUIDANCE_SIDES if self.cfg_split else 1),
            "pipeline_parallel_degree": ("block_parallel", blocks if self.block_parallel else 1),
        }
        for name, asked in requests.items():
            # bool is an int, and True > 1 is false: each kind is compared in its own way.
            if name in known and isinstance(asked, bool):
                if asked and not known[name]:
                    yield f"{name} is asked for and not supported"
            elif name in degrees and not isinstance(asked, bool):
                capability, most = degrees[name]
                if most is not None and asked > most:
                    why = f"at most {most} is possible" if known[capability] else f"it has no {capability}"
                    yield f"{name} {asked} is asked for, and {why}"
            else:
                kinds = [*(f"{one} (true or false)" for one in known), *(f"{one} (a number)" for one in degrees)]
                raise CapabilityError(
                    f"`{name}={asked}` asks for no capability", hint=f"a request is one of {', '.join(kinds)}"
                )


def require_capabilities(
    families: Mapping[str, tuple[str, AdapterCapabilities]], requests: Mapping[str, Mapping[str, Request]]
) -> None:
    """Refuse requests that a family cannot meet, all of them in one message.

    Args:
        families: Name and capabilities of the family of each graph.
        requests: What is asked of each graph.

    Raises:
        CapabilityError: Lists every violation of every graph.
    """
    violations = [
        f"{graph} ({families[graph][0]}): {violation}"
        for graph, asked in requests.items()
        for violation in families[graph][1].violations(asked)
    ]
    if violations:
        raise CapabilityError(
            "\n".join([f"{len(violations)} requests cannot be met:", *violations]),
            hint="`sdconvert adapters list` shows what each family can do; change the recipe",
        )
