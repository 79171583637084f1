import json
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest
from fuzz import harness
from fuzz.edits import inputs
from fuzz.harness import BrokenRuleError, Target, minimized
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, Phase, given, settings
from peft import PeftConfig

from peft_quant.reading import read_json


CORPUS = sorted((Path(__file__).parent / "corpus").glob("*/*.jsonl"))


@pytest.fixture(scope="module", autouse=True)
def no_sandbox_is_left():
    yield
    harness.close()


@pytest.fixture(scope="module")
def warm():
    """A target whose imports are done."""
    done = set()

    def get(name):
        if name not in done:
            TARGETS[name].warm_up()
            done.add(name)
        return TARGETS[name]

    return get


@pytest.mark.parametrize("name", TARGETS)
def test_small_part(name, warm):
    target = warm(name)

    @settings(
        derandomize=True,
        max_examples=40,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(target.files))
    def keeps_the_rule(edits):
        target.check(edits)

    assert target.check([])
    keeps_the_rule()


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_past_failures(file, warm):
    edits = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    warm(file.parent.name).check(edits)


class TestRule:
    """What readers must not do, each done by a reader made for it."""

    FILES = {"a.json": b'{"a": 1}'}

    def broken(self, read, edits=(), **options):
        with pytest.raises(BrokenRuleError) as caught:
            Target("made", read, lambda: self.FILES, **options).check(list(edits))
        return caught.value.kind

    def test_reading_is_accepted(self):
        assert Target("made", lambda folder: read_json(folder / "a.json"), lambda: self.FILES).check([])

    def test_documented_errors_are_refusals(self):
        target = Target("made", lambda folder: read_json(folder / "a.json"), lambda: self.FILES)
        assert not target.check([["splice", "a.json", 0, 1, ""]])

    def test_errors_that_escaped(self):
        assert self.broken(lambda folder: {}["a"]).startswith("KeyError")
        assert self.broken(lambda folder: int("a")).startswith("ValueError")

    def test_errors_raised_elsewhere(self):
        def read(folder):
            raise ValueError("of another package")

        assert self.broken(read, foreign=(ValueError,)).startswith("ValueError")  # nor by a package
        read = PeftConfig.from_pretrained
        assert self.broken(read).startswith("ValueError")
        assert not Target("made", read, lambda: self.FILES, foreign=(ValueError,)).check([])

    def test_files_outside(self):
        def swallow(folder):
            with suppress(BaseException):
                (folder.parent / "outside" / "secret").read_bytes()

        assert self.broken(swallow) == "read outside of the directory"
        link = [["link", "a.json", "../outside/secret"]]
        assert self.broken(lambda folder: (folder / "a.json").read_bytes(), link).startswith("read outside")
        assert self.broken(lambda folder: (folder.parent / "new").write_bytes(b"")).startswith("write outside")
        assert self.broken(lambda folder: (folder.parent / "outside" / "secret").unlink()).startswith("write outside")
        assert Target("made", lambda folder: (folder / "new").write_bytes(b""), lambda: self.FILES).check([])

    def test_processes_and_pickles(self):
        assert self.broken(lambda folder: os.system("true")).startswith("os.system")

    def test_work_that_takes_long(self, monkeypatch):
        monkeypatch.setattr(harness, "SECONDS", 0.01)

        def work(folder):
            begin = time.process_time()
            while time.process_time() < begin + 0.02:
                pass

        assert self.broken(work) == "slow"

    def test_waiting(self, monkeypatch):
        monkeypatch.setattr(harness, "_PATIENCE", 0.05)
        waiting = [["fifo", "a.json"]]
        assert self.broken(lambda folder: (folder / "a.json").read_bytes(), waiting).startswith("hang")

    def test_failures_are_minimized(self):
        target = Target(
            "made", lambda folder: {1: 1}[json.loads((folder / "a.json").read_text())["a"]], lambda: self.FILES
        )
        edits = [["set", "a.json", ["b"], 3], ["set", "a.json", ["a"], [[]]], ["copy", "a.json", "a.json"]]
        with pytest.raises(BrokenRuleError) as caught:
            target.check(edits)
        assert minimized(target, edits, caught.value.kind) == [["set", "a.json", ["a"], []]]
