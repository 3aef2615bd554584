"""The choice under a budget, against every combination."""

import itertools
import random

import pytest

from fewbit.mixed_precision.allocate import Option, allocate, hull


def total(groups, chosen):
    picked = [options[index] for options, index in zip(groups, chosen, strict=True)]
    return sum(option.size for option in picked), sum(option.cost for option in picked)


def brute_force(groups, budget):
    combinations = (
        (sum(option.size for option in picked), sum(option.cost for option in picked))
        for picked in itertools.product(*groups)
    )
    return min(cost for size, cost in combinations if size <= budget)


def like_layers(random_, count):
    """Options as layers have them: two group sizes at 2, 3, 4 and 8 bits, the cost falling about fourfold per bit."""
    groups = []
    for _ in range(count):
        weights, sensitivity = random_.choice([64, 256]), random_.lognormvariate(0, 1.5)
        groups.append(
            [
                Option(
                    int(weights * (bits + 32 / group)),
                    sensitivity * 4.0**-bits * random_.uniform(0.8, 1.2) * group,
                )
                for bits in (2, 3, 4, 8)
                for group in (32, 64)
            ]
        )
    return groups


def test_nearly_always_as_good_as_trying_everything():
    optimal = 0
    for seed in range(60):
        random_ = random.Random(seed)
        groups = like_layers(random_, 4)
        smallest, largest = (sum(pick(o.size for o in options) for options in groups) for pick in (min, max))
        budget = random_.randint(smallest, largest)
        size, cost = total(groups, allocate(groups, budget))
        assert size <= budget
        optimal += cost <= 1.001 * brute_force(groups, budget)
    assert optimal >= 54


@pytest.mark.parametrize("seed", range(20))
def test_any_numbers_stay_within_the_budget_and_near_the_optimum(seed):
    random_ = random.Random(seed)
    groups = [
        [Option(random_.randint(1, 40), random_.random()) for _ in range(random_.randint(1, 5))]
        for _ in range(5)
    ]
    smallest, largest = (sum(pick(o.size for o in options) for options in groups) for pick in (min, max))
    budget = random_.randint(smallest, largest)
    size, cost = total(groups, allocate(groups, budget))
    assert size <= budget
    # The relaxed problem's solution differs in one group.
    spread = max(max(o.cost for o in options) - min(o.cost for o in options) for options in groups)
    assert cost <= brute_force(groups, budget) + spread


def test_many_groups_fill_the_budget():
    groups = like_layers(random.Random(0), 400)
    smallest = sum(min(o.size for o in options) for options in groups)
    budget = int(1.37 * smallest)
    size, _ = total(groups, allocate(groups, budget))
    assert 0.999 * budget <= size <= budget


def test_a_pair_is_exchanged_where_no_single_change_helps():
    # Along the hulls the first group takes 6 of 10; the second needs all 10.
    groups = [[Option(0, 7.0), Option(6, 0.0)], [Option(0, 10.0), Option(10, 0.0)]]
    assert allocate(groups, 10) == [0, 1]


def test_a_budget_of_the_smallest_options_takes_them():
    groups = [[Option(3, 1.0), Option(2, 5.0)], [Option(1, 0.0)]]
    assert allocate(groups, 3) == [1, 0]


def test_more_bytes_are_not_used_where_they_buy_nothing():
    assert allocate([[Option(2, 1.0), Option(9, 1.0), Option(5, 2.0)]], 100) == [0]


def test_too_small_a_budget_is_refused():
    with pytest.raises(ValueError, match="smallest options take 5 bytes, 1 more than the budget"):
        allocate([[Option(5, 1.0), Option(6, 0.0)]], 4)


def test_the_hull_leaves_out_what_a_mixture_beats():
    options = [Option(1, 10.0), Option(2, 9.0), Option(3, 2.0), Option(4, 2.5), Option(5, 1.0)]
    assert hull(options) == [0, 2, 4]
