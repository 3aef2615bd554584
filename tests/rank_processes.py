"""Forked processes connected like the processes of torchrun."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fewbit.distributed import open_communicator
from fewbit.errors import FewbitError


def run_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return each process's result of ``work(comm, *arguments)``, or its FewbitError; None for a killed process."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(target=_rank, args=(rank, world, Path(folder), pipes[rank][1], work, arguments))
            for rank in range(world)
        ]
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        results = [_received(receiver) for receiver, _ in pipes]
        for process in processes:
            process.join(timeout=60)
            assert process.exitcode is not None, "a process hangs"
    return results


def _rank(rank: int, world: int, folder: Path, sender: Any, work: Any, arguments: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        with open_communicator() as comm:
            result = work(comm, *arguments)
    except FewbitError as error:
        result = error
    sender.send(result)
    dist.destroy_process_group()


def _received(receiver: Any) -> Any:
    assert receiver.poll(timeout=60), "a process hangs"
    try:
        return receiver.recv()
    except EOFError:
        return None
