"""Bytes of live tensors, counted while operations make and drop them."""

import torch

from fewbit.estimate.live import HEAP_BYTES, LiveBytes


def test_counts_what_is_made_and_forgets_what_is_freed():
    given = torch.ones(100)
    with LiveBytes() as live:
        x = given + 1
        y = x * 2
        assert live.now == 800
        del x
        assert live.now == 400
        assert live.peak == 800
        live.mark()
        assert live.peak == 400
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


def test_only_small_storages_are_of_the_heap():
    with LiveBytes() as live:
        small, large = torch.empty(1000), torch.empty(HEAP_BYTES, dtype=torch.uint8)
        assert live.heap == 4000
        assert live.now == 4000 + HEAP_BYTES
        del small, large
    assert live.heap == 0
