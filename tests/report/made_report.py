"""The report of a run, and its page taken apart."""

from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser

from tiny_run import RECIPE

from sdconvert.artifacts import RunFolder
from sdconvert.config import Recipe
from sdconvert.report.artifact import ReportArtifact
from sdconvert.report.stage import ReportStage
from sdconvert.stages import StageContext


class Steps:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def step(self, done: int, total: int, note: str = "") -> None:
        self.told.append((done, total))


class Page(HTMLParser):
    """What a page holds: every tag with its attributes, what was left open, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: Counter[str] = Counter()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        self.open[tag] -= 1

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self) -> set[str | None]:
        """Exact values of all numbers."""
        return {attributes["value"] for tag, attributes in self.tags if tag == "data"}


@dataclass(frozen=True)
class Report:
    artifact: ReportArtifact
    page: Page
    metrics: dict[str, object]


def make_report(run: RunFolder, recipe: Recipe = RECIPE) -> Report:
    artifact = ReportArtifact(run.stage_folder("80-report"))
    metrics = ReportStage().run(StageContext(recipe, artifact.folder, run, Steps()))
    return Report(artifact, Page(artifact.html.read_text(encoding="utf-8")), metrics)
