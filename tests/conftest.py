import logging
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Two OpenMP threads on two busy cores spin against each other.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_log_level():
    # Commands, called here in the tests' own process, turn fewbit's log down for the rest of theirs.
    logger = logging.getLogger("fewbit")
    level = logger.level
    yield
    logger.setLevel(level)
