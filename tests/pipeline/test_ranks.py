"""What the processes of one run exchange, and how they end together."""

import os
import signal
import time

import pytest
import torch

from fewbit.distributed import Communicator, joined
from fewbit.errors import ConfigError, ModelError, RankError
from fewbit.pipeline.layer_quantizer import Follower
from rank_processes import run_ranks


def exchanges(ranks):
    """One of everything; ranks bring different numbers of rows."""
    mine = torch.full((ranks.rank, 2), ranks.rank, dtype=torch.int16)
    matrix = torch.arange(14, dtype=torch.float16).reshape(7, 2)
    part = ranks.part(7)
    total = torch.full((2,), float(ranks.rank + 1))
    ranks.add_(total)
    return {
        "share": list(ranks.share(range(7))),
        "first": ranks.first(None if ranks.rank == 0 else 5 + ranks.rank),
        "nobody": ranks.first(None),
        "add": total.tolist(),
        "total": ranks.total(ranks.rank, 1),
        "all": ranks.all(True, ranks.rank != 1),
        "gather": ranks.gather(mine).tolist(),
        "part": torch.equal(part.gather(matrix[part.rows]), matrix),
        "part total": float(part.total(matrix[part.rows].float().sum())),
        "tiny": ranks.part(ranks.world - 1).rows,
        "collect": ranks.collect(f"rank {ranks.rank}"),
        "leader": ranks.from_leader(f"said by {ranks.rank}"),
        "tensors": {
            name: tensor.tolist()
            for name, tensor in ranks.tensors_from_leader(
                lambda: {"a": matrix.T, "none": torch.empty(0, dtype=torch.int32), "one": torch.tensor(3.5)}
            ).items()
        },
    }


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_gets_the_same_and_it_is_that_of_all(world):
    seen = run_ranks(world, exchanges)
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


def test_one_process_is_the_same_without_exchanges():
    alone = exchanges(Communicator())
    assert alone["share"] == list(range(7))
    assert (alone["total"], alone["all"], alone["collect"]) == ([0, 1], [True, True], ["rank 0"])
    assert alone["part"]
    assert alone["tensors"]["one"] == 3.5


@pytest.mark.parametrize(("items", "world"), [(7, 3), (2, 3), (0, 2), (100, 3)])
def test_shares_are_consecutive_and_even(items, world):
    shares = run_ranks(world, lambda ranks: list(ranks.share(range(items))))
    assert [item for share in shares for item in share] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def one_fails(ranks, error):
    if ranks.rank == 1:
        raise error
    while True:
        ranks.total(1)


def test_an_error_of_one_rank_ends_all_with_this_error():
    for result in run_ranks(3, one_fails, ModelError("the weight w holds NaN values")):
        assert isinstance(result, ModelError)
        assert str(result) == "the weight w holds NaN values"


def leader_refuses(ranks):
    if ranks.leader:
        raise ModelError("no")
    return ranks.from_leader(None)


def test_what_the_leader_refuses_is_refused_by_all():
    results = run_ranks(3, leader_refuses)
    assert [(type(result), str(result)) for result in results] == [(ModelError, "no")] * 3


def fails_outside_of_fewbit(ranks):
    if ranks.rank == 1:
        try:
            with_an_error(ranks)
        except ZeroDivisionError:
            return "raised its own"
    while True:
        ranks.total(1)


def with_an_error(ranks):
    ranks.failed(ZeroDivisionError("division by zero"))
    raise ZeroDivisionError


def test_an_error_that_is_not_fewbits_is_named_with_its_rank():
    results = run_ranks(2, fails_outside_of_fewbit)
    assert results[1] == "raised its own"
    assert isinstance(results[0], RankError)
    assert "rank 1 failed: ZeroDivisionError: division by zero" in str(results[0])


def one_is_killed(ranks):
    ranks.total(1)
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        ranks.total(1)


def test_a_killed_rank_ends_the_others_with_its_number_and_what_to_do():
    start = time.monotonic()
    first, killed, third = run_ranks(3, one_is_killed)
    assert killed is None
    for result in (first, third):
        assert isinstance(result, RankError)
        assert "rank 1 of 3 did not answer" in str(result)
        assert "ranks 0, 2 left" in str(result)
        assert "start the same command again to go on" in str(result)
    assert time.monotonic() - start < 20


def one_is_interrupted(ranks):
    if ranks.rank == 1:
        ranks.failed(KeyboardInterrupt())
        return None
    while True:
        ranks.total(1)


def test_an_interrupted_rank_is_no_failure_of_its_own():
    first, _ = run_ranks(2, one_is_interrupted)
    assert isinstance(first, RankError)
    assert "the run was interrupted. If an output folder was given" in str(first)


def test_finished_tensors_cannot_be_asked_for_out_of_turn():
    with pytest.raises(
        RankError, match=r"came back to layers\.0\.q after its block was finished, which works in one"
    ):
        Follower({}).tensors("layers.0.q")


@pytest.fixture
def launched(monkeypatch):
    """As torchrun starts the second of two processes, but without the address of the first."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    values = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    return monkeypatch


def join(device):
    with joined(device):
        pass


def test_every_process_takes_its_own_gpu(launched):
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


def test_or_its_share_of_the_cores_and_says_whom_it_cannot_reach(launched):
    threads = []
    launched.setattr(torch, "set_num_threads", threads.append)
    launched.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    with pytest.raises(
        RankError, match=r"rank 1 cannot reach the others at None:None: .* Check the address and the fire"
    ):
        join("cpu")
    assert threads == [8]


def test_without_torchrun_nothing_is_joined(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with joined("cuda:7") as speaks:
        assert speaks


def on_another_machine(ranks):
    if ranks.rank == 1:
        torch.backends.cpu.get_cpu_capability = lambda: "of another kind"
    ranks.alike(config="c")


def test_machines_that_round_in_other_ways_are_refused():
    for result in run_ranks(2, on_another_machine):
        assert isinstance(result, RankError)
        assert "another kind of processor" in str(result)
        assert "on machines of one kind" in str(result)


def test_ranks_that_were_started_with_other_things_are_refused():
    results = run_ranks(2, lambda ranks: ranks.alike(calibration_data=str(ranks.rank), config="c"))
    assert all(isinstance(result, RankError) for result in results)
    assert "rank 1 has another calibration data than rank 0: start all processes with the same" in str(
        results[0]
    )
    assert run_ranks(2, lambda ranks: ranks.alike(config="c")) == [None, None]


def queued_on_a_gpu(ranks):
    """What NCCL does: return at once, whoever is there."""
    if ranks.rank == 1:
        raise ModelError("the model is damaged")
    done = []
    ranks._exchange(lambda group: done.append(group), device=torch.device("cuda"))
    return "it went on to a kernel that never ends"


def test_before_something_is_queued_on_a_gpu_all_have_to_be_there():
    seen = run_ranks(2, queued_on_a_gpu)
    assert [type(one) for one in seen] == [ModelError, ModelError]
    assert str(seen[0]) == "the model is damaged"


def test_nothing_to_gather_on_any_rank():
    seen = run_ranks(2, lambda ranks: ranks.gather(torch.empty(0, 3, dtype=torch.int16)))
    assert [(one.shape, one.dtype) for one in seen] == [((0, 3), torch.int16)] * 2
