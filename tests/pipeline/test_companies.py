"""Experts that are met and solved together get, bit for bit, what they get one after the other.

On the CPU all arithmetic is the same: Hessians are sums of integers, LAPACK factors the matrices of a batch one by one,
and rows are swept apart. On a GPU ties may break otherwise.
"""

import json
import weakref
from collections import Counter

import pytest
import torch

from fewbit import QuantConfig
from fewbit.context import RunContext, no_progress
from fewbit.distributed import Communicator
from fewbit.errors import OutputError, SolverError
from fewbit.gptq.cholesky import NO_TOKENS
from fewbit.modeling.experts import unfuse, unfused_modules
from fewbit.pipeline import expert_calibration as routing
from fewbit.pipeline import memory as room
from fewbit.pipeline import offload as spill
from fewbit.pipeline import quantize_layers as run
from fewbit.pipeline import solving
from fewbit.pipeline.companies import formed
from fewbit.pipeline.journal import Journal
from fewbit.pipeline.layer_quantizer import LayerQuantizer, MemorySink
from fewbit.pipeline.quantize_layers import quantize_layers
from fewbit.pipeline.scheduler import walk
from fewbit.pipeline.streaming import Weights
from fewbit.planning import make_plan
from fewbit.preparation import calibrate
from models import random_sequences, tiny_tokenizer
from moe_models import EXPERTS, STARVED, UNREACHED, tiny_moe
from rank_processes import run_ranks

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")
EXPERTS_1 = "model.layers.1.mlp.experts"


def walked(
    family, company, sequences=None, *, sink=None, ranks=None, offload_dir=None, progress=no_progress,
    dtype=torch.float32, device="cpu", blocks=2, **options,
):  # fmt: skip
    """A tiny model after the walk: every tensor, every record without its seconds, and the notes."""
    model = tiny_moe(family, num_hidden_layers=blocks).to(device, dtype)
    unfuse(model)
    config = QuantConfig(**{"group_size": 16, "seq_len": 24, **options})
    calibration = calibrate(config, sequences or random_sequences(8), tiny_tokenizer(), model.config)
    sink = sink if sink is not None else MemorySink()
    plan = make_plan(model, config)
    ctx = RunContext(config, comm=ranks or Communicator(), progress=progress, offload_dir=offload_dir)
    notes = quantize_layers(model, plan, calibration, sink, Weights(model), ctx, company)
    assert all(record["seconds"] > 0 for record in sink.records.values())
    assert not any(experts.companies for experts in unfused_modules(model).values())
    records = {
        name: json.loads(json.dumps({**record, "seconds": 0})) for name, record in sink.records.items()
    }
    return model.state_dict(), records, notes


def assert_same(one, other):
    (state, records, notes), (others, other_records, other_notes) = one, other
    for name, tensor in state.items():
        assert torch.equal(others[name], tensor), name
    assert other_records == records
    assert other_notes == notes


@pytest.fixture
def solves(monkeypatch):
    """Names of the layers of each family of each call of the solver."""
    calls = []
    quantize_together, siblings = solving.quantize_together, solving.LayerSolver._siblings
    names = []

    def named(self, family, parts):
        names.append([layer.name for layer in family.layers])
        return siblings(self, family, parts)

    def counted(families, settings, **options):
        calls.append(names[-len(families) :])
        return quantize_together(families, settings, **options)

    monkeypatch.setattr(solving.LayerSolver, "_siblings", named)
    monkeypatch.setattr(solving, "quantize_together", counted)
    return calls


OPTIONS = {
    "both streams": {},
    "one stream": {"fast": True},
    "refitted": {"bits": 3, "sym": False, "refit": True, "act_order": "full"},
    "other bits, nearest, left out": {
        "override": {
            rf"{EXPERTS_1}\.1\.": {"bits": 8},
            rf"{EXPERTS_1}\.2\.up_proj": {"group_size": 32},
            rf"{EXPERTS_1}\.3\.": {"method": "rtn"},
        },
        "ignore": (rf"{EXPERTS_1}\.0\.(gate|up)_proj", rf"{EXPERTS_1}\.4\.down_proj"),
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_gets_what_it_gets_on_its_own(family, options):
    alone = walked(family, 1, **options)
    together = walked(family, 4, **options)
    assert_same(together, alone)
    _, records, _ = together
    assert records[f"{EXPERTS_1}.{STARVED}.gate_proj"]["added"] > 0
    if "override" in options:
        assert records[f"{EXPERTS_1}.1.up_proj"]["bits"] == 8
        assert f"{EXPERTS_1}.0.up_proj" not in records


def test_tuned_blocks_are_the_same():
    options = {"bits": 2, "tune": True, "tune_steps": 3}
    assert_same(walked("mixtral", 4, **options), walked("mixtral", 1, **options))


def test_the_solver_is_called_with_several_families(solves):
    walked("qwen3_moe", None)
    assert len(solves) == 2 * (4 + 3 * EXPERTS)
    assert all(len(families) == 1 for families in solves)
    solves.clear()
    walked("qwen3_moe", 4)
    experts = [families for families in solves if ".experts." in families[0][0]]
    assert len(experts) == 2 * 2 * 2  # blocks, companies, halves
    assert experts[-2:] == [
        [[f"{EXPERTS_1}.{n}.gate_proj", f"{EXPERTS_1}.{n}.up_proj"] for n in (4, 5)],
        [[f"{EXPERTS_1}.{n}.down_proj"] for n in (4, 5)],
    ]
    assert Counter(map(len, experts)) == {4: 4, 2: 4}
    assert len(solves) - len(experts) == 2 * 4


def test_by_default_companies_are_formed_where_a_device_gains_and_has_room(monkeypatch, solves):
    monkeypatch.setattr(run, "gains_from_company", lambda device: True)
    monkeypatch.setattr(room, "free_device_bytes", lambda device: 10**9)
    walked("qwen3_moe", None, fast=True)
    assert Counter(map(len, solves)) == {1: 2 * 4, EXPERTS: 2 * 2}
    solves.clear()
    monkeypatch.setattr(room, "free_device_bytes", lambda device: 10**5)
    walked("qwen3_moe", None, fast=True)
    assert all(len(families) == 1 for families in solves)


def test_an_expert_without_a_token_is_rounded_to_nearest(monkeypatch, solves):
    monkeypatch.setattr(routing, "TOKENS_PER_FEATURE", 0)  # nobody gets tokens that were sent to others
    alone = walked("mixtral", 1)
    solves.clear()
    together = walked("mixtral", EXPERTS)
    assert_same(together, alone)
    _, records, notes = together
    record = records[f"{EXPERTS_1}.{UNREACHED}.down_proj"]
    assert (record["tokens"], record["fallbacks"][0]) == (0, NO_TOKENS)
    assert any("no calibration token reached 6 layers" in note for note in notes)
    assert max(map(len, solves)) == EXPERTS - 1


def test_padding_enters_no_hessian():
    lengths = torch.randint(5, 30, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = [
        {"input_ids": s["input_ids"][:n]} for s, n in zip(random_sequences(9, 30), lengths, strict=True)
    ]
    alone, together = (
        walked("qwen3_moe", size, sequences, batch_size=3, dtype=torch.bfloat16) for size in (1, 3)
    )
    assert_same(together, alone)
    assert sum(record["masked"] for record in together[1].values()) > 0


class KilledError(OutputError):
    """What ends a run in these tests."""


def test_a_run_that_was_killed_among_the_experts_goes_on(tmp_path, solves):
    expected = walked("qwen3_moe", 4)

    def kill(phase, done, total):
        if done > 0.8 * total:
            raise KilledError("killed")

    prints = {"config": "a"}
    journal = Journal(tmp_path, prints)
    with pytest.raises(KilledError):
        walked("qwen3_moe", 4, sink=journal, progress=kill)
    journal.close()
    solves.clear()
    journal = Journal(tmp_path, prints)
    assert {record["block"] for record in journal.records.values()} == {"model.layers.0"}
    assert_same(walked("qwen3_moe", 4, sink=journal), expected)
    assert all(".layers.1." in name for families in solves for family in families for name in family)
    assert solves
    journal.remove()


def test_experts_that_are_finished_are_left_alone(solves):
    sink = MemorySink()
    expected, *_ = walked("qwen3_moe", 4, sink=sink)
    finished = [
        f"{EXPERTS_1}.1.gate_proj",
        *(f"{EXPERTS_1}.2.{part}_proj" for part in ("gate", "up", "down")),
    ]
    known = MemorySink()
    known.append(
        "", {name: sink.tensors(name) for name in finished}, {name: sink.records[name] for name in finished}
    )
    solves.clear()
    state, *_ = walked("qwen3_moe", 4, sink=known)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    assert [[f"{EXPERTS_1}.0.gate_proj", f"{EXPERTS_1}.0.up_proj"], [f"{EXPERTS_1}.1.up_proj"]] in [
        families[:2] for families in solves
    ]
    assert not {name for families in solves for family in families for name in family} & {*finished}


def test_strict_mode_names_the_layer():
    with pytest.raises(
        SolverError, match=rf"layer model.layers.0.mlp.experts.{STARVED}.gate_proj needed a fallback"
    ):
        walked("mixtral", EXPERTS, strict=True)


def test_inputs_of_a_company_are_spilled_like_any_others(tmp_path, monkeypatch):
    expected, _, _ = walked("mixtral", 3)
    monkeypatch.setattr(spill, "_SMALLEST", 1)
    solve_ahead, elsewhere = LayerQuantizer.solve_ahead, []

    def spy(self, parties):
        inputs = [arrival.x for party in parties for arrival in party.arrivals]
        elsewhere.extend(x.untyped_storage().nbytes() == 0 for x in inputs)
        solve_ahead(self, parties)

    monkeypatch.setattr(LayerQuantizer, "solve_ahead", spy)
    state, _, notes = walked("mixtral", 3, offload_dir=tmp_path)
    assert len(elsewhere) > 100
    assert all(elsewhere)
    assert any("activations of paused batches were kept on disk" in note for note in notes)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_no_input_outlives_its_layers():
    model = tiny_moe("mixtral")
    unfuse(model)
    layers = {f"{EXPERTS_1}.{n}.{part}_proj": None for n in range(EXPERTS) for part in ("gate", "up", "down")}
    layers = {name: model.get_submodule(name) for name in layers}
    inputs, met = [], []

    def meet(name, arrivals):
        met.append(name)
        if name in companies.points:
            assert not [x for x in inputs if x() is not None]
            given = [x for arrival in arrivals for x in (arrival.x, *arrival.others)]
            assert len(given) == 3 * EXPERTS
            inputs[:] = [weakref.ref(x) for x in given if len(x)]

    tokens = random_sequences(3, 60)
    with torch.no_grad(), formed(model, {EXPERTS_1: EXPERTS}) as companies:
        points = companies.meeting_points(layers)
        jobs = [lambda s=s: model(s["input_ids"][None], use_cache=False) for s in tokens]
        walk(points, jobs, meet)
    firsts = [name for name in layers if not name.endswith("down_proj")]
    downs = [name for name in layers if name.endswith("down_proj")]
    point, other = companies.points
    assert list(points) == [point, *firsts, other, *downs]
    assert met == [name for name in points if f".{UNREACHED}." not in name]


def test_a_point_without_layers_of_interest_is_none():
    model = tiny_moe("mixtral")
    unfuse(model)
    down = f"{EXPERTS_1}.4.down_proj"
    layers = {name: model.get_submodule(name) for name in (down, "lm_head")}
    with formed(model, {EXPERTS_1: 4}) as companies:
        assert list(companies.meeting_points(layers)) == [f"{EXPERTS_1}.from_4.down_proj", down, "lm_head"]
    with formed(model, {}) as companies:
        assert companies.points == {}
        assert companies.meeting_points(layers) == layers


@pytest.mark.parametrize("size", [2, 4, EXPERTS])
def test_outputs_are_the_same_bits(size):
    model = tiny_moe("deepseek_v3")
    unfuse(model)
    tokens = torch.stack([s["input_ids"] for s in random_sequences(2)])
    with torch.no_grad():
        expected = model(tokens).logits
        with formed(model, dict.fromkeys(unfused_modules(model), size)):
            assert torch.equal(model(tokens).logits, expected)
        assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize(
    ("world", "count", "options"),
    [
        pytest.param(2, 7, {}, id="both streams"),
        pytest.param(2, 7, {"fast": True, "dtype": torch.bfloat16}, id="one stream, bfloat16"),
        pytest.param(3, 2, {"fast": True}, id="more ranks than batches"),
    ],
)
def test_several_processes_agree(world, count, options):
    sequences = random_sequences(count)
    alone = walked("mixtral", 1, sequences, blocks=1, **options)

    def divided(ranks):
        found = walked("mixtral", 4, sequences, ranks=ranks, blocks=1, **options)
        assert_same(found, alone)
        return ranks.rank

    assert run_ranks(world, divided) == list(range(world))


def test_all_processes_form_the_smallest_company(monkeypatch):
    model = tiny_moe("qwen3_moe")
    unfuse(model)
    one, other = unfused_modules(model)
    monkeypatch.setattr(run, "gains_from_company", lambda device: True)

    def sizes(ranks):
        found = {one: 5, other: 4} if ranks.leader else {one: 3}
        monkeypatch.setattr(run, "companies_on_device", lambda *_: found)
        return run._companies(model, None, Weights(model), [], 1, ranks, None)

    assert run_ranks(2, sizes) == [{one: 3}] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_experts_are_solved_together(solves):
    on_cpu = walked("qwen3_moe", None)[1]
    on_gpu = walked("qwen3_moe", None, device="cuda")[1]
    assert EXPERTS in map(len, solves)
    first = [
        name for name in on_cpu if name.startswith("model.layers.0.")
    ]  # later, routes depend on rounding
    assert [on_gpu[name]["loss"] for name in first] == pytest.approx(
        [on_cpu[name]["loss"] for name in first], rel=0.1
    )
