"""One finished run and its report; tests that damage a run take a copy."""

import pytest
from made_report import Report, make_report
from tiny_run import write_run

from sdconvert.artifacts import RunFolder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="session")
def report(finished: RunFolder) -> Report:
    return make_report(finished)
