"""Bytes of live tensors, counted while operations make and drop them."""

import torch

from fewbit.estimate.trial import ARENA_BYTES, LiveBytes


def test_counts_what_is_made_and_forgets_what_is_freed():
    given = torch.ones(100)
    with LiveBytes() as live:
        x = given + 1
        y = x * 2
        assert live.now == 800
        del x
        assert live.now == 400
        assert live.peak == 800
        del y
    assert live.now == 0


def test_views_and_what_was_there_before_cost_nothing():
    given = torch.ones(10, 10)
    with LiveBytes() as live:
        views = given.t(), given.view(100), torch.nn.Parameter(given)
        assert live.now == 0
        made = torch.zeros(10)
        parts = made.chunk(2)
        assert live.now == 40
        del made
        assert live.now == 40
        del parts, views
    assert live.now == 0


def test_only_small_storages_count_for_the_arena():
    with LiveBytes() as live:
        small, large = torch.empty(1000), torch.empty(ARENA_BYTES, dtype=torch.uint8)
        assert live.arena == 4000
        assert live.now == 4000 + ARENA_BYTES
        del small, large
    assert live.arena == 0
