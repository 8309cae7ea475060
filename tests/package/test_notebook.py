"""Executes docs/walkthrough.ipynb in a fresh kernel and compares its outputs with the stored ones.

If it runs as a program, it stores the outputs instead.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  # builds the font cache, or the notebook's cell warns
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs/walkthrough.ipynb"
METADATA = {  # Jupyter also stores the version of Python and the times of execution
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
STORED = nbformat.read(NOTEBOOK, as_version=4)
CODE = [cell for cell in STORED.cells if cell.cell_type == "code"]


def execute(folder: Path) -> nbformat.NotebookNode:
    """Returns the notebook executed by this Python in the folder, without the user's settings."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    dropped = ("TRITON_INTERPRET", "MPLBACKEND", "PYTHONWARNINGS")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder), "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        # The kernel named python3 is looked for here first.
        patch.setenv("JUPYTER_PATH", str(Path(sys.prefix) / "share/jupyter"))
        client = NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True)
        client.execute(cwd=str(folder), env=environment)
    notebook.metadata = METADATA
    return notebook


def outputs(cell: nbformat.NotebookNode) -> list[tuple]:
    """Returns what each output of the cell shows: its text, and the formats of a figure."""
    shown = []
    for output in cell.outputs:
        data = output.get("data", {})
        text = output.get("text") or data.get("text/plain")
        shown.append((output.output_type, output.get("name"), text, sorted(data)))
    return shown


def test_outputs_equal_the_stored_ones(demo_gguf, tmp_path):
    executed = [cell for cell in execute(tmp_path).cells if cell.cell_type == "code"]
    assert [outputs(cell) for cell in executed] == [outputs(cell) for cell in CODE]


def test_notebook_was_stored_executed_in_order():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert STORED.metadata == METADATA
    assert not any(cell.metadata for cell in STORED.cells)


def test_cells_and_outputs_are_short():
    assert NOTEBOOK.stat().st_size < 250_000  # bytes
    for cell in STORED.cells:
        assert len(cell.source.splitlines()) <= 12, cell.id
        assert max(map(len, cell.source.splitlines())) <= 120, cell.id


def test_outputs_are_text_and_figures():
    figures = 0
    for cell in CODE:
        for kind, stream, text, formats in outputs(cell):
            assert (kind, stream) in [("stream", "stdout"), ("display_data", None)], cell.id
            assert len(text) < 1000 and not re.search(r"(^|[\s'\"(=])(/|[A-Z]:\\)\w", text), cell.id
            figures += formats == ["image/png", "text/plain"]
    assert figures >= 10


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        nbformat.write(execute(Path(temporary)), NOTEBOOK)
