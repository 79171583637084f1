"""`peft-quant merge`."""

import pytest
from full_disk import limited_file_size
from gptq_models import load, save_tiny_llama
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from peft_quant import LRECConfig, PEQAConfig, merge_checkpoint


@pytest.fixture
def adapter(models, tmp_path):
    config = PEQAConfig(task_type="CAUSAL_LM", init_weights=False)
    get_peft_model(load(models / "base"), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_writes_what_the_function_does(run, models, adapter, tmp_path):
    result = run("merge", models / "base", adapter, tmp_path / "out")
    assert result.code == 0, result.stderr
    assert "14 scales" in result.stdout
    merge_checkpoint(models / "base", adapter, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_dry_run_writes_nothing_and_says_what_would_be(run, models, adapter, tmp_path):
    before = contents(tmp_path)
    result = run("merge", models / "base", adapter, tmp_path / "out", "--dry-run", "--push-to-hub", "user/merged")
    assert result.code == 0, result.stderr
    assert contents(tmp_path) == before
    listed = {line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")}
    merge_checkpoint(models / "base", adapter, tmp_path / "out")
    assert listed | {"README.md", "peft_quant_facts.json"} == {path.name for path in (tmp_path / "out").iterdir()}
    assert "user/merged" in result.stdout


def test_a_disk_that_is_full_in_the_middle(run, models, adapter, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with limited_file_size(50_000):
        result = run("merge", models / "base", adapter, tmp_path / "out")
    assert result.code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: [Errno 27] File too large: nothing was changed. Make room, or choose another")
    assert error.endswith(f"directory: '{tmp_path / 'out'}'")
    assert sorted(tmp_path.rglob("*")) == before


class TestErrors:
    """The same with and without `--dry-run`; nothing is left."""

    @pytest.fixture(params=((), ("--dry-run",)), ids=str)
    def refused(self, request, run, tmp_path):
        def refused(base, adapter, message, out=tmp_path / "out"):
            before = sorted(tmp_path.iterdir())
            result = run("merge", base, adapter, out, *request.param)
            assert result.code == 1
            assert message in result.stderr.splitlines()[-1]
            assert result.stderr.splitlines()[-1].startswith("error: ")
            assert sorted(tmp_path.iterdir()) == before

        return refused

    def test_it_exists(self, refused, models, adapter, tmp_path):
        (tmp_path / "here").mkdir()
        refused(models / "base", adapter, "exists already", tmp_path / "here")

    def test_another_base(self, refused, adapter, tmp_path):
        other = save_tiny_llama(tmp_path / "other", seed=1)
        refused(other, adapter, "was trained on another base model")

    def test_no_gptq_checkpoint(self, refused, models, adapter):
        refused(models / "float", adapter, "is not a GPTQ checkpoint")

    def test_an_adapter_that_does_not_merge(self, refused, models, tmp_path):
        config = LRECConfig(task_type="CAUSAL_LM", r=2)
        get_peft_model(load(models / "base"), config).save_pretrained(tmp_path / "lrec")
        refused(models / "base", tmp_path / "lrec", "Only PEQA adapters merge")

    def test_clamped_scales(self, refused, run, models, adapter, tmp_path):
        file = adapter / "adapter_model.safetensors"
        save_file({name: tensor - 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        refused(models / "base", adapter, "--allow-clamped-scales")
        assert run("merge", models / "base", adapter, tmp_path / "out", "--allow-clamped-scales").code == 0

    def test_no_room(self, refused, models, adapter, monkeypatch):
        usage = type("Usage", (), {"free": 10})
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
        refused(models / "base", adapter, "Make room")


def test_wrong_usage(run, models):
    result = run("merge", models / "base")
    assert result.code == 2
    assert "adapter" in result.stderr.lower()


def test_a_traceback_is_shown_on_request(models, tmp_path, monkeypatch):
    from peft_quant.cli import main

    monkeypatch.setenv("PEFT_QUANT_DEBUG", "1")
    with pytest.raises(FileExistsError):
        main(["merge", str(models / "base"), "adapter", str(tmp_path)])
