"""What a stage keeps for its next try: there after a failure, gone after success, another recipe, or `--fresh`."""

from pathlib import Path
from typing import Any

import pytest

from sdconvert.artifacts import RunFolder
from sdconvert.config import Recipe
from sdconvert.stages import StageContext, StageOutcome, run_stages


class Parts:
    """Makes three parts, of which it keeps what it has; fails once before the given one."""

    name, title, schema_version = "10-parts", "makes parts", 1
    after: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.made: list[int] = []
        self.fails_before: int | None = None

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return {"pipeline": {"prompt": recipe.pipeline.prompt}}

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        return {}

    def run(self, context: StageContext) -> dict[str, Any]:
        context.scratch.mkdir(exist_ok=True)
        for part in range(3):
            if part == self.fails_before:
                self.fails_before = None
                raise KeyboardInterrupt
            kept = context.scratch / f"{part}.txt"
            if not kept.exists():
                self.made.append(part)
                kept.write_text(context.recipe.pipeline.prompt)
        return {}


class Quiet:
    def begin(self, stage: Any, why: str) -> None: ...

    def step(self, done: int, total: int, note: str = "") -> None: ...

    def end(self, outcome: StageOutcome) -> None: ...


def go(root: Path, stage: Parts, prompt: str = "a cat", *, fresh: bool = False) -> list[int]:
    """The parts that one run made."""
    stage.made = []
    recipe = Recipe.model_validate({"pipeline": {"prompt": prompt}})
    try:
        run_stages(recipe, RunFolder(root), [stage], fresh=fresh, progress=Quiet())
    except KeyboardInterrupt:
        assert list(root.glob(".resume-*"))
    return stage.made


def failed(root: Path) -> Parts:
    stage = Parts()
    stage.fails_before = 2
    assert go(root, stage) == [0, 1]
    return stage


def test_a_failed_stage_goes_on_and_leaves_nothing_when_it_is_done(tmp_path: Path) -> None:
    assert go(tmp_path, failed(tmp_path)) == [2]
    assert not list(tmp_path.glob(".resume-*"))


@pytest.mark.parametrize(("prompt", "fresh"), [("a dog", False), ("a cat", True)])
def test_what_belongs_to_another_request_is_not_taken_up(tmp_path: Path, prompt: str, fresh: bool) -> None:
    assert go(tmp_path, failed(tmp_path), prompt, fresh=fresh) == [0, 1, 2]
