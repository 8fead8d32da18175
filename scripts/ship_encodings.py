"""Copy the encodings of a run of `pasd_tiny` to `encodings/pasd_tiny/`, where they are shipped.

    sdconvert convert pasd_tiny --to mha2sha
    python scripts/ship_encodings.py build/pasd_tiny

One file per graph and form holds parameters and activations; `param_encodings` in it is what `parameters_mha.encodings`
and `parameters_sha.encodings` of the run hold. `tests/test_shipped_encodings.py` makes them anew and compares.
"""

import argparse
from pathlib import Path

from sdconvert.io.encodings import dump_encodings, read_encodings
from sdconvert.io.files import write_text_atomic

SHIPPED = Path(__file__).parents[1] / "encodings" / "pasd_tiny"
FORMS = {"mha": "30-quantize", "sha": "40-mha2sha"}
"""Form of attention → the stage that writes it."""


def main() -> None:
    """Read the command line and copy."""
    parser = argparse.ArgumentParser(description="Copy the encodings of a run to the folder that is shipped.")
    parser.add_argument("run", type=Path, help="run folder, such as build/pasd_tiny")
    run = parser.parse_args().run
    SHIPPED.mkdir(parents=True, exist_ok=True)
    for form, stage in FORMS.items():
        for source in sorted((run / stage).glob("*/*.encodings")):
            if not source.name.startswith("parameters_"):
                target = SHIPPED / f"{source.stem}_{form}.encodings"
                write_text_atomic(dump_encodings(read_encodings(source)), target)
                print(target)


if __name__ == "__main__":
    main()
