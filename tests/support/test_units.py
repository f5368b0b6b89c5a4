"""Amounts in words, at the edges of their units."""

from luthier.support.units import in_bytes, in_flops, in_time


def test_bytes():
    assert [in_bytes(x) for x in (2.5e9, 3.2e6, 1e6, 999)] == ["2.5 GB", "3 MB", "1 MB", "1 kB"]


def test_seconds():
    assert [in_time(x) for x in (90, 119, 120, 600, 9000)] == ["90 s", "119 s", "2 min", "10 min", "2.5 h"]


def test_flops():
    assert [in_flops(x) for x in (3.21e12, 0, 999)] == ["3.21 TFLOP", "0 FLOP", "999 FLOP"]
