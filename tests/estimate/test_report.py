"""The report of what a run holds in memory, from plain rows."""

from dataclasses import replace

from peft_quant.estimate.report import MemoryReport, MemoryRow


REPORT = MemoryReport(
    [
        MemoryRow("weights", "int8, fp32 scales", 1_000_000, 1_004_000, True),
        MemoryRow("momentum", "int8", 1_000_000, 1_000_000, True),
        MemoryRow("logits", "fp32", 500_000, 2_000_000, False),
    ],
    parameters=1_000_000,
)


def test_sums():
    assert REPORT.states == 2_004_000
    assert REPORT.total == 4_004_000
    # fp32 AdamW: a weight, a gradient and two moments, 4 bytes each
    assert REPORT.share_of_adam == 2_004_000 / 16_000_000


def test_table():
    lines = str(REPORT).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["weights", "momentum", "logits", "states", "estimated"]
    assert lines[1].split() == ["weights", "int8,", "fp32", "scales", "1,000,000", "1.0"]
    assert "12.5% of fp32 AdamW" in lines[4]
    assert lines[5].endswith("4.0")


def test_rows_that_come_and_go():
    report = replace(REPORT, apart=500_000)
    assert report.states == REPORT.states
    assert report.total == REPORT.total - 500_000
    assert str(report).splitlines()[5].split() == ["not", "at", "the", "peak", "-0.5"]
    assert str(report).splitlines()[6].endswith("3.5")


def test_a_peak_that_is_not_known():
    report = replace(REPORT, rows=REPORT.rows[:2], peak_known=False)
    assert report.total == report.states
    assert str(report).splitlines()[4].endswith("not estimated")
