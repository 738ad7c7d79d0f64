"""Run the notebooks of examples/notebooks and store their printed output and figures in them.

python scripts/notebooks.py       `make notebooks` runs this file.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "notebooks"
Json = dict[str, Any]


def run(notebook: Json) -> Iterator[tuple[Json, list[Json]]]:
    """Yield each code cell and its outputs. An exception in a cell ends the run."""
    namespace: Json = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
            text = printed.getvalue().splitlines(keepends=True)
            stream = {"name": "stdout", "output_type": "stream", "text": text}
            yield cell, [*([stream] if text else []), *pictures()]


def pictures() -> Iterator[Json]:
    """Yield every open figure as an output, and close it."""
    for number in pyplot.get_fignums():
        data = io.BytesIO()
        # Without matplotlib's name and version, so that a new version does not change the file.
        pyplot.figure(number).savefig(data, format="png", dpi=80, metadata={"Software": None})
        pyplot.close(number)
        image = base64.b64encode(data.getvalue()).decode()
        yield {"data": {"image/png": image}, "metadata": {}, "output_type": "display_data"}


def main() -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for count, (cell, outputs) in enumerate(run(notebook), 1):
            cell["execution_count"], cell["outputs"] = count, outputs
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
