import logging
import os

import pytest
import torch

from models import TEXT, save_tiny

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


@pytest.fixture
def text_file(tmp_path):
    """A text of about 3,000 characters to calibrate with."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 8)
    return path


@pytest.fixture
def model_folder(tmp_path):
    """A tiny Llama with its tokenizer."""
    return save_tiny(tmp_path / "model")
