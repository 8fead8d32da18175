"""Times of one graph as a runner took them, and the plan by which a bench takes them."""

from dataclasses import dataclass, field
from typing import Literal

from sdconvert.android.climate import Climate

LoopMode = Literal["closed", "teacher-forced"]
"""Whether a step begins where the one before ended, or where fp32 was."""


@dataclass(frozen=True)
class Plan:
    """What a bench measures beside the answers.

    Attributes:
        inferences: How often each graph is run for its time.
        rounds: In how many runs of the runner; several bundles take turns after each.
        cool_down_s: Longest wait for a cool phone before times are taken.
        op_profile: Whether the cycles of every op are taken, in a run of their own.
        sustained_minutes: How long the graph that dominates is run without a pause; 0 for not at all.
        loops: How the test pictures are sampled; None: in both ways, where the bundle holds pictures.
    """

    inferences: int = 100
    rounds: int = 1
    cool_down_s: float = 300.0
    op_profile: bool = False
    sustained_minutes: float = 0.0
    loops: tuple[LoopMode, ...] | None = None


@dataclass(frozen=True)
class Timing:
    """One run of a graph for its time; times in milliseconds.

    Attributes:
        times_ms: The inferences that count, in their order.
        first_ms: The very first inference, which powers the NPU up.
        load_ms: Loading the context, where the runner says.
        climates: How the device was before and after; nothing where it does not say.
        counters: What else the profile counts, such as HVX threads, by the profile's own names.
        peak_kb: Most memory of the runner's process, in KiB.
        npu_ms: How long the NPU alone took for each of these inferences, where the runner says.
    """

    times_ms: list[float]
    first_ms: float | None = None
    load_ms: float | None = None
    climates: tuple[tuple[Climate, Climate], ...] = ()
    counters: dict[str, float] = field(default_factory=dict)
    peak_kb: int | None = None
    npu_ms: list[float] = field(default_factory=list)


def joined(rounds: list[Timing]) -> Timing:
    """Return several runs of one graph as one; first inference and loading are those of the first run."""
    peaks = [one.peak_kb for one in rounds if one.peak_kb is not None]
    return Timing(
        times_ms=[value for one in rounds for value in one.times_ms],
        first_ms=rounds[0].first_ms,
        load_ms=rounds[0].load_ms,
        climates=tuple(pair for one in rounds for pair in one.climates),
        counters=rounds[-1].counters,
        peak_kb=max(peaks, default=None),
        npu_ms=[value for one in rounds for value in one.npu_ms] if all(one.npu_ms for one in rounds) else [],
    )
