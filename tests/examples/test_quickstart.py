"""The notebook, from top to bottom on a tiny random model; what is stored in it is of a run on SmolLM2."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tiny_assets import GPTQ_MODEL


NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def printed(notebook):
    """What the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def test_it_runs(assets, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    made = {"gptq_model": assets / GPTQ_MODEL, "king_james": assets / "king-james"}
    stub = "".join(f"def {name}():\n    return {str(path)!r}\n" for name, path in made.items())
    (tmp_path / "demo_assets.py").write_text(stub, encoding="utf-8")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert "loaded adapter: largest difference of a logit 0.0\n" in printed(notebook)
    assert "same arithmetic: largest difference of a logit 0.0\n" in printed(notebook)


def test_its_outputs_are_stored():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert "4-bit" in notebook.cells[0].source
    assert "held-out perplexity" in printed(notebook)
    assert "/tmp" not in NOTEBOOK.read_text(encoding="utf-8")
