import pytest
import torch

from fewbit.calibration.sampling import blocks, choose, cut_windows, thin

TEXT = "".join(f"line {i} of some length {'x' * (i % 23)}\n" for i in range(300))


@pytest.mark.parametrize("piece", [1, 7, 100, 10**6])
@pytest.mark.parametrize("size", [30, 64, 1000, 10**6])
def test_blocks_lose_nothing_and_do_not_depend_on_the_pieces(piece, size):
    result = list(blocks((TEXT[i : i + piece] for i in range(0, len(TEXT), piece)), size))
    assert "".join(result) == TEXT
    assert max(map(len, result)) <= size
    assert result == list(blocks([TEXT], size))


def test_blocks_end_at_a_line_end_or_where_there_is_none_at_the_size():
    assert all(block.endswith("\n") for block in blocks([TEXT], 200))
    assert list(blocks(["a" * 25], 10)) == ["a" * 10, "a" * 10, "a" * 5]


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 100, 1023])
def test_thin_keeps_evenly_spaced_items(count):
    kept, stride, seen = thin(iter(range(count)), 5)
    assert kept == list(range(0, count, stride))
    assert len(kept) <= 5
    assert seen == count
    assert (stride == 1) == (count <= 5)


@pytest.mark.parametrize(("count", "wanted"), [(0, 3), (2, 3), (3, 3), (10, 3), (1000, 128)])
def test_choose_takes_one_from_each_part(count, wanted):
    chosen = choose(count, wanted, seed=1)
    assert len(chosen) == min(count, wanted)
    assert chosen == sorted(set(chosen))
    if wanted < count:
        for part, position in enumerate(chosen):
            assert part * count // wanted <= position < (part + 1) * count // wanted


@pytest.mark.parametrize(("count", "lengths"), [(0, []), (3, [3]), (4, [4]), (11, [4, 4])])
def test_cut_windows(count, lengths):
    windows = cut_windows(torch.arange(count), 4)
    assert [len(window) for window in windows] == lengths
    assert torch.cat([torch.empty(0), *windows]).tolist() == list(range(sum(lengths)))
