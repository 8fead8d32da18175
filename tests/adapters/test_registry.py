"""The registry answers with the nearest ancestor, and says what it knows when it cannot."""

import pytest

from sdconvert.adapters.registry import ClassRegistry
from sdconvert.errors import UnsupportedModelError


class Model:
    pass


class ControlModel(Model):
    pass


class TinyControlModel(ControlModel):
    pass


class Cover:
    pass


class ControlCover(Cover):
    pass


@pytest.fixture
def registry() -> ClassRegistry[type[Cover]]:
    registry: ClassRegistry[type[Cover]] = ClassRegistry("adapter")
    registry.register(Model)(Cover)
    registry.register(ControlModel)(ControlCover)
    return registry


def test_nearest_ancestor_answers(registry: ClassRegistry[type[Cover]]) -> None:
    assert registry.lookup(Model) is Cover
    assert registry.lookup(ControlModel) is ControlCover
    assert registry.lookup(TinyControlModel) is ControlCover


def test_order_of_registration_does_not_matter() -> None:
    registry: ClassRegistry[type[Cover]] = ClassRegistry("adapter")
    registry.register(ControlModel)(ControlCover)
    registry.register(Model)(Cover)
    assert registry.lookup(TinyControlModel) is ControlCover


def test_a_class_is_covered_once(registry: ClassRegistry[type[Cover]]) -> None:
    with pytest.raises(UnsupportedModelError, match="Model already has the adapter Cover") as error:
        registry.register(Model)(ControlCover)
    assert "ControlCover came second" in error.value.hint
    assert registry.lookup(Model) is Cover


def test_an_unknown_class_gets_the_known_ones_and_the_nearest(registry: ClassRegistry[type[Cover]]) -> None:
    class ControlModul:
        pass

    with pytest.raises(UnsupportedModelError, match="no adapter covers ControlModul; known: ControlModel, Model") as e:
        registry.lookup(ControlModul)
    assert "as ControlModel does" in e.value.hint
