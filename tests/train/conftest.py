from collections.abc import Iterator

import pytest
from crash import Worker


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    w = Worker()
    yield w
    w.process.kill()
    w.process.communicate()
