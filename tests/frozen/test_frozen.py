"""The bytes of what is written stay the same while the code is restructured; removed at its end."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_frozen():
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "frozen.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
