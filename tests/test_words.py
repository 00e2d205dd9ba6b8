"""Times and sizes read like speech."""

import pytest

from rwkv_nb.words import bytes_text, duration_text, number_text


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"),
                                           (7500, "2 h 05 min")])
def test_durations(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize("n, text", [(0, "0 bytes"), (999, "999 bytes"), (4_321, "4.32 kB"), (999_400, "999 kB"),
                                     (999_600, "1 MB"), (3_405_000_000, "3.4 GB"), (2**50, "1125900 GB")])
def test_sizes(n, text):
    assert bytes_text(n) == text


@pytest.mark.parametrize("n, text", [(12, "12"), (4_321, "4.32 k"), (999_950_000, "1 B"), (1_527_404_544, "1.53 B")])
def test_counts(n, text):
    assert number_text(n) == text
