"""The memory benchmark runs, and what it measures does not grow with the text."""

from benchmarks import memory


def test_prepare_holds_a_small_part_of_the_text(tmp_path):
    above = memory.measure(tmp_path, 120, 500_000, 32, ("prepare",))
    assert above["prepare"] < 40 << 20, "of 57 MiB of text; 23 bytes a byte once"
