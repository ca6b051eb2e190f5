import pytest
from crash import Worker
from forked import Server


@pytest.fixture(scope="session")
def worker(server: Server) -> Worker:
    return Worker(server)
