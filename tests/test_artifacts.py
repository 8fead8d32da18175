"""Manifests say what a stage left; what has none does not exist."""

import math
from pathlib import Path

from sdconvert.artifacts import Manifest, describe_outputs
from sdconvert.io.files import sha256_file


def test_manifest_round_trip_and_absence(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("abc")
    outputs = describe_outputs(tmp_path)
    assert outputs["weights"].sha256 == sha256_file(tmp_path / "weights")
    manifest = Manifest(
        stage="30-quantize",
        fingerprint="f",
        inputs={"photo": "1"},
        outputs=outputs,
        settings={"a": [1, None]},
        versions={"torch": "2"},
        metrics={"sqnr_db": math.inf},
        seconds=1.5,
        peak_rss_bytes=7,
    )
    assert Manifest.load(tmp_path) is None
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert describe_outputs(tmp_path) == outputs
