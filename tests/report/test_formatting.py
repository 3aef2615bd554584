"""Numbers as people read them."""

import pytest

from fewbit import formatting as words


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (words.percent, 0.1234, "12.3 %"),
        (words.percent, 0.00417, "0.417 %"),
        (words.percent, 1.0, "100 %"),
        (words.percent, None, "–"),
        (words.number, 24.9, "24.90"),
        (words.number, 0.01271, "0.0127"),
        (words.number, 3_215_000.4, "3,215,000"),
        (words.number, 0, "0.00"),
        (words.size, 538_123_456, "538 MB"),
        (words.alpha, 0.0556, "0.06"),
        (words.alpha, None, "–"),
        (words.size, 12, "12 bytes"),
        (words.size, 999_600, "1.00 MB"),
        (words.size, 5.2e12, "5.20 TB"),
        (words.size, None, "–"),
        (words.count, 32704, "32,704"),
        (words.parameters, 134_515_008, "135 M"),
        (words.parameters, 6_738_415_616, "6.74 B"),
        (words.duration, 0.418, "0.42 s"),
        (words.duration, 62.4, "62.4 s"),
        (words.duration, 125, "2 min 05 s"),
        (words.duration, 11520, "3 h 12 min"),
    ],
)
def test_figures(function, value, text):
    assert function(value) == text


def test_a_spread_has_the_places_of_its_value():
    assert words.spread(24.9, 0.5789) == " ± 0.58"
    assert words.spread(0.1271, 0.0042) == " ± 0.004"
    assert words.spread(24.9, None) == ""


def test_plurals():
    assert words.plural(1, "layer") == "1 layer"
    assert words.plural(1204, "layer") == "1,204 layers"
    assert words.plural(2, "weight matrix", "weight matrices") == "2 weight matrices"


@pytest.mark.parametrize(
    ("kl", "verdict"),
    [(0, "hardly"), (0.03, "close"), (0.072, "small"), (0.18, "clear"), (0.45, "large"), (2, "broken")],
)
def test_a_verdict(kl, verdict):
    assert verdict in words.verdict(kl)
