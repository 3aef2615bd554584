import logging
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined: without a GPU, its interpreter runs them on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Two OpenMP threads on two busy cores spin against each other.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _log_not_silenced():
    # Commands, called in the tests' own process (fixtures included), turn fewbit's log down for the rest of theirs.
    logging.getLogger("fewbit").setLevel(logging.NOTSET)
