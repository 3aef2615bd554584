"""Collectives of the communicator, and how an error on one rank ends all ranks."""

import os
import signal
import time

import pytest
import torch

from fewbit.distributed import Communicator, torchrun_session
from fewbit.errors import ConfigError, ModelError, RankError
from fewbit.pipeline.layer_quantizer import NonLeaderSink
from rank_processes import run_ranks


def every_collective(comm):
    """Call every collective once; ranks pass different numbers of rows."""
    mine = torch.full((comm.rank, 2), comm.rank, dtype=torch.int16)
    matrix = torch.arange(14, dtype=torch.float16).reshape(7, 2)
    part = comm.row_shard(7)
    total = torch.full((2,), float(comm.rank + 1))
    comm.all_reduce_(total)
    return {
        "share": list(comm.share(range(7))),
        "first": comm.all_reduce_min(None if comm.rank == 0 else 5 + comm.rank),
        "nobody": comm.all_reduce_min(None),
        "add": total.tolist(),
        "total": comm.all_reduce_sum(comm.rank, 1),
        "all": comm.all_reduce_and(True, comm.rank != 1),
        "gather": comm.all_gather_rows(mine).tolist(),
        "part": torch.equal(part.gather(matrix[part.rows]), matrix),
        "part total": float(part.reduce(matrix[part.rows].float().sum())),
        "tiny": comm.row_shard(comm.world_size - 1).rows,
        "collect": comm.all_gather_object(f"rank {comm.rank}"),
        "leader": comm.broadcast_object(f"said by {comm.rank}"),
        "tensors": {
            name: tensor.tolist()
            for name, tensor in comm.broadcast_tensors(
                lambda: {"a": matrix.T, "none": torch.empty(0, dtype=torch.int32), "one": torch.tensor(3.5)}
            ).items()
        },
    }


@pytest.mark.parametrize("world", [2, 3])
def test_collectives_agree_on_all_ranks(world):
    seen = run_ranks(world, every_collective)
    assert [item for one in seen for item in one.pop("share")] == list(range(7))
    assert all(one == seen[0] for one in seen)
    matrix = torch.arange(14.0).reshape(7, 2)
    assert seen[0] == {
        "first": 6,
        "nobody": None,
        "add": [world * (world + 1) / 2] * 2,
        "total": [sum(range(world)), world],
        "all": [True, False],
        "gather": [[rank] * 2 for rank in range(world) for _ in range(rank)],
        "part": True,
        "part total": float(matrix.sum()),
        "tiny": slice(0, world - 1),
        "collect": [f"rank {rank}" for rank in range(world)],
        "leader": "said by 0",
        "tensors": {"a": matrix.T.tolist(), "none": [], "one": 3.5},
    }


def test_single_process_communicator():
    alone = every_collective(Communicator())
    assert alone["share"] == list(range(7))
    assert (alone["total"], alone["all"], alone["collect"]) == ([0, 1], [True, True], ["rank 0"])
    assert alone["part"]
    assert alone["tensors"]["one"] == 3.5


@pytest.mark.parametrize(("items", "world"), [(7, 3), (2, 3), (0, 2), (100, 3)])
def test_shares_are_consecutive_and_even(items, world):
    shares = run_ranks(world, lambda comm: list(comm.share(range(items))))
    assert [item for share in shares for item in share] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def one_fails(comm, error):
    if comm.rank == 1:
        raise error
    while True:
        comm.all_reduce_sum(1)


def test_error_on_one_rank_is_raised_on_all():
    for result in run_ranks(3, one_fails, ModelError("the weight w holds NaN values")):
        assert isinstance(result, ModelError)
        assert str(result) == "the weight w holds NaN values"


def leader_raises(comm):
    if comm.is_leader:
        raise ModelError("no")
    return comm.broadcast_object(None)


def test_error_on_leader_is_raised_on_all():
    results = run_ranks(3, leader_raises)
    assert [(type(result), str(result)) for result in results] == [(ModelError, "no")] * 3


def fails_outside_of_fewbit(comm):
    if comm.rank == 1:
        try:
            with_an_error(comm)
        except ZeroDivisionError:
            return "raised its own"
    while True:
        comm.all_reduce_sum(1)


def with_an_error(comm):
    comm.failed(ZeroDivisionError("division by zero"))
    raise ZeroDivisionError


def test_foreign_error_is_reported_with_its_rank():
    results = run_ranks(2, fails_outside_of_fewbit)
    assert results[1] == "raised its own"
    assert isinstance(results[0], RankError)
    assert "rank 1 failed: ZeroDivisionError: division by zero" in str(results[0])


def one_is_killed(comm):
    comm.all_reduce_sum(1)
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        comm.all_reduce_sum(1)


def test_killed_rank_is_reported_by_the_others():
    start = time.monotonic()
    first, killed, third = run_ranks(3, one_is_killed)
    assert killed is None
    for result in (first, third):
        assert isinstance(result, RankError)
        assert "rank 1 of 3 did not answer" in str(result)
        assert "ranks 0, 2 left" in str(result)
        assert "start the same command again to go on" in str(result)
    assert time.monotonic() - start < 20


def one_is_interrupted(comm):
    if comm.rank == 1:
        comm.failed(KeyboardInterrupt())
        return None
    while True:
        comm.all_reduce_sum(1)


def test_interrupted_rank_is_not_a_failure():
    first, _ = run_ranks(2, one_is_interrupted)
    assert isinstance(first, RankError)
    assert "the run was interrupted. If an output folder was given" in str(first)


def test_non_leader_sink_has_no_tensors():
    with pytest.raises(
        RankError, match=r"came back to layers\.0\.q after its block was finished, which works in one"
    ):
        NonLeaderSink({}).tensors("layers.0.q")


@pytest.fixture
def launched(monkeypatch):
    """The environment of torchrun's second process of two, without the address of the first."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    values = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    return monkeypatch


def join(device):
    with torchrun_session(device):
        pass


def test_each_process_takes_the_gpu_of_its_local_rank(launched):
    with pytest.raises(
        ConfigError, match="device 'cuda:1' would be every process's: with torchrun give cuda"
    ):
        join("cuda:1")
    launched.setattr(torch.cuda, "is_available", lambda: True)
    launched.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ConfigError, match="process 1 of this machine has no GPU of its own, there are 1: start fewer"
    ):
        join("auto")


def test_each_process_takes_its_share_of_the_cores(launched):
    threads = []
    launched.setattr(torch, "set_num_threads", threads.append)
    launched.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    with pytest.raises(
        RankError, match=r"rank 1 cannot reach the others at None:None: .* Check the address and the fire"
    ):
        join("cpu")
    assert threads == [8]


def test_no_session_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with torchrun_session("cuda:7") as is_leader:
        assert is_leader


def on_another_machine(comm):
    if comm.rank == 1:
        torch.backends.cpu.get_cpu_capability = lambda: "of another kind"
    comm.assert_same(config="c")


def test_machines_that_round_differently_are_refused():
    for result in run_ranks(2, on_another_machine):
        assert isinstance(result, RankError)
        assert "another kind of processor" in str(result)
        assert "on machines of one kind" in str(result)


def test_ranks_with_other_arguments_are_refused():
    results = run_ranks(2, lambda comm: comm.assert_same(calibration_data=str(comm.rank), config="c"))
    assert all(isinstance(result, RankError) for result in results)
    assert "rank 1 has another calibration data than rank 0: start all processes with the same" in str(
        results[0]
    )
    assert run_ranks(2, lambda comm: comm.assert_same(config="c")) == [None, None]


def queued_on_a_gpu(comm):
    """A collective that returns at once, as NCCL does, whether or not the other ranks are alive."""
    if comm.rank == 1:
        raise ModelError("the model is damaged")
    done = []
    comm._exchange(lambda group: done.append(group), device=torch.device("cuda"))
    return "it went on to a kernel that never ends"


def test_dead_rank_is_noticed_before_gpu_work_is_queued():
    seen = run_ranks(2, queued_on_a_gpu)
    assert [type(one) for one in seen] == [ModelError, ModelError]
    assert str(seen[0]) == "the model is damaged"


def test_gather_of_no_rows():
    seen = run_ranks(2, lambda comm: comm.all_gather_rows(torch.empty(0, 3, dtype=torch.int16)))
    assert [(one.shape, one.dtype) for one in seen] == [((0, 3), torch.int16)] * 2
