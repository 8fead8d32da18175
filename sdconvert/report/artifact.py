"""What the report stage leaves: `report.html` and `report.json`, and the pictures in both as PNG files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdconvert.io.files import read_json


@dataclass(frozen=True)
class ReportArtifact:
    """The stage's folder."""

    folder: Path

    @property
    def html(self) -> Path:
        """The page: one file that needs no other."""
        return self.folder / "report.html"

    @property
    def json(self) -> Path:
        """The page's figures."""
        return self.folder / "report.json"

    def picture(self, name: str, variant: str) -> Path:
        """Return where the picture of a held-out crop lies, such as `chelsea-tile` by `simulator`."""
        return self.folder / "pictures" / f"{name}-{variant}.png"

    def figures(self) -> dict[str, Any]:
        """Read `report.json`; infinite dB, which equal tensors have, are infinite again."""
        figures: dict[str, Any] = read_json(self.json)
        return figures
