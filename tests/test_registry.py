"""A registry answers with the nearest ancestor, says what it knows when it cannot, and takes entries from outside."""

import subprocess
import sys
from pathlib import Path

import pytest

from sdconvert.errors import AmbiguousAdapterError, RegistrationError, UnsupportedModelError
from sdconvert.registry import ClassRegistry


class Model:
    def forward(self) -> int:
        return 1


class ControlModel(Model):
    pass


class TinyControlModel(ControlModel):
    pass


class Picture:
    pass


class PictureModel(Model, Picture):
    pass


class Cover:
    pass


class ControlCover(Cover):
    pass


Registry = ClassRegistry[type[Cover]]


@pytest.fixture
def registry() -> Registry:
    registry: Registry = ClassRegistry("adapter", Cover)
    registry.register(Model)(Cover)
    registry.register(ControlModel)(ControlCover)
    return registry


def test_x2_exact_class_then_nearest_ancestor_answers(registry: Registry) -> None:
    assert registry.lookup(Model) is Cover
    assert registry.lookup(ControlModel) is ControlCover
    assert registry.lookup(TinyControlModel) is ControlCover
    assert registry.lookup(PictureModel) is Cover


def test_x2_order_of_registration_does_not_matter() -> None:
    registry: Registry = ClassRegistry("adapter")
    registry.register(ControlModel)(ControlCover)
    registry.register(Model)(Cover)
    assert registry.lookup(TinyControlModel) is ControlCover
    assert list(registry.entries()) == [ControlModel, Model]


def test_x2_two_unrelated_ancestors_are_ambiguous(registry: Registry) -> None:
    registry.register(Picture)(ControlCover)
    with pytest.raises(AmbiguousAdapterError, match=r"Model \(Cover\) and Picture \(ControlCover\)") as error:
        registry.lookup(PictureModel)
    assert "@AdapterRegistry.register(PictureModel)" in error.value.hint
    registry.register(PictureModel)(Cover)
    assert registry.lookup(PictureModel) is Cover


def test_x2_two_ancestors_with_one_cover_are_not_ambiguous(registry: Registry) -> None:
    registry.register(Picture)(Cover)
    assert registry.lookup(PictureModel) is Cover


def test_x2_a_class_is_covered_once_unless_overridden(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match="Model already has the adapter Cover; ControlCover came second") as e:
        registry.register(Model)(ControlCover)
    assert "@AdapterRegistry.register(Model, override=True)" in e.value.hint
    assert registry.lookup(Model) is Cover
    registry.register(Model, override=True)(ControlCover)
    assert registry.lookup(Model) is ControlCover


def test_x2_an_override_of_nothing_is_refused(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match="override the adapter of Picture, which has none"):
        registry.register(Picture, override=True)(Cover)
    assert not registry.covers(Picture)


def test_x2_what_does_not_extend_the_base_is_refused_with_both_names(registry: Registry) -> None:
    class Stranger:
        pass

    with pytest.raises(RegistrationError, match="Stranger cannot be the adapter of Picture: it is no Cover") as error:
        registry.register(Picture)(Stranger)  # type: ignore[arg-type]
    assert "class Stranger(Cover)" in error.value.hint
    assert not registry.covers(Picture)


def test_x3_an_unknown_class_gets_the_known_ones_and_the_line_to_write(registry: Registry) -> None:
    class ControlModul:
        pass

    with pytest.raises(UnsupportedModelError, match="no adapter covers ControlModul; known: ControlModel, Model") as e:
        registry.lookup(ControlModul)
    assert "`@AdapterRegistry.register(ControlModul)`, as ControlModel does" in e.value.hint


def test_x3_each_registry_has_its_own_error() -> None:
    class UnsupportedThingError(UnsupportedModelError):
        pass

    registry: Registry = ClassRegistry("attention processor", error=UnsupportedThingError)
    with pytest.raises(UnsupportedThingError, match="known: none") as error:
        registry.lookup(Model)
    assert "@AttentionProcessorRegistry.register(Model)" in error.value.hint


def test_x4_a_method_of_its_own_cuts_a_class_off_from_its_ancestors() -> None:
    class Changed(ControlModel):
        def forward(self) -> int:
            return 2

    class ChangedTwice(Changed):
        pass

    registry: Registry = ClassRegistry("layer", method="forward")
    registry.register(Model)(Cover)
    assert registry.lookup(TinyControlModel) is Cover
    for cls in (Changed, ChangedTwice):
        with pytest.raises(UnsupportedModelError, match=f"no layer covers {cls.__name__}"):
            registry.lookup(cls)
    registry.register(Changed)(ControlCover)
    assert registry.lookup(ChangedTwice) is ControlCover


def outside_package(folder: Path, name: str, module: str, code: str) -> None:
    """What `pip install` leaves of a package with one module and an entry point."""
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sdconvert.adapters]\n{name} = {module}\n")


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(folder)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


LOOKUP = """
from sdconvert.registry import ClassRegistry
SHAPES = ClassRegistry("shape")
SHAPES.register(int)("whole number")
import types
sys.modules["shapes"] = types.SimpleNamespace(SHAPES=SHAPES)
from sdconvert.errors import SdconvertError
try:
    print(SHAPES.lookup(str), list(SHAPES.entries()))
except SdconvertError as error:
    print(type(error).__name__, error)
"""


def test_x1_entry_points_are_loaded_at_the_first_lookup(tmp_path: Path) -> None:
    code = "from shapes import SHAPES\nassert SHAPES.lookup(int)\nSHAPES.register(str)('text')\n"
    outside_package(tmp_path, "toy", "toy_shapes", code)
    assert run(tmp_path, LOOKUP).stdout.strip() == "text [<class 'int'>, <class 'str'>]"


@pytest.mark.parametrize("code", ["import no_such_module", "def broken(:"])
def test_x1_a_package_that_cannot_be_imported_is_named(tmp_path: Path, code: str) -> None:
    outside_package(tmp_path, "toy", "toy_shapes", code)
    answer = run(tmp_path, LOOKUP).stdout
    assert answer.startswith("ExtensionError entry point `toy = toy_shapes` of toy cannot be loaded")
    assert "hint: repair or uninstall toy" in answer
