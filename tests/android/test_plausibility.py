"""A time is doubted only where somebody has published one for the same graph."""

import pytest

from sdconvert.android.manifest import GraphRecord, TensorRecord
from sdconvert.android.plausibility import doubt

UNET = {"sample": (1, 4, 64, 64), "t_emb": (1, 320), "encoder_hidden_states": (1, 77, 768)}
BYTES = 870_000_000


def graph(name: str = "unet", shapes: dict[str, tuple[int, ...]] = UNET) -> GraphRecord:
    inputs = tuple(TensorRecord(name=key, dtype="float32", shape=shape) for key, shape in shapes.items())
    return GraphRecord(name=name, soc="SM8650", context="c", epcontext="e", inputs=inputs, outputs=())


@pytest.mark.parametrize("p50_ms", [30.0, 79.1, 230.0])
def test_times_of_the_published_order_are_taken(p50_ms: float) -> None:
    assert doubt(graph(), BYTES, "SM8650", p50_ms) == ""


def test_a_slow_graph_looks_like_the_processor() -> None:
    told = doubt(graph(), BYTES, "SM8650", 791.0)
    assert told.startswith("`unet` took 791.0 ms; 79.1 ms are published for SM8650 (Qualcomm AI Hub, SD1.5 w8a16")
    assert "10.0 times as long looks like work on the CPU" in told


def test_a_graph_that_is_too_fast_does_not_do_its_work() -> None:
    told = doubt(graph("vae_decoder", {"latent_sample": (1, 4, 64, 64)}), 52_000_000, "SM8550", 1.0)
    assert told == ""  # nobody has published one for this SoC
    told = doubt(graph("vae_decoder", {"latent_sample": (1, 4, 64, 64)}), 52_000_000, "SM8850", 10.0)
    assert "11.7 times as fast" in told


def test_a_soc_goes_by_the_name_that_it_is_compiled_as() -> None:
    assert "262.5 ms are published for QCS8275" in doubt(graph(), BYTES, "QCS8275", 2000.0)


@pytest.mark.parametrize(
    ("other", "context_bytes"),
    [
        (graph("text_encoder"), BYTES),
        (graph(shapes=UNET | {"sample": (2, 4, 64, 64)}), BYTES),
        (graph(shapes=UNET | {"sample": (1, 4, 96, 96)}), BYTES),
        (graph(shapes=UNET | {"encoder_hidden_states": (1, 77, 1024)}), BYTES),
        (graph(), BYTES // 2),
        (graph(), BYTES * 3),
    ],
)
def test_of_graphs_that_nobody_has_published_nothing_is_said(other: GraphRecord, context_bytes: int) -> None:
    assert doubt(other, context_bytes, "SM8650", 5000.0) == ""
