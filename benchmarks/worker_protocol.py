"""The protocol of `fewbit.bench.worker`, for workers in an environment without fewbit."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def answer_requests(worker: Any) -> None:
    """Answer each line of stdin with a method of `worker`; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("do"))(**request)
        print(json.dumps(answer), file=answers, flush=True)
