"""What several files of stage tests share."""

import pytest

from tests.stages import short_run


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Data, a tokenizer and the straight run of `short_run`."""
    return short_run.prepare(tmp_path_factory.mktemp("short"))
