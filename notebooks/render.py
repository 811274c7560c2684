"""Make the .ipynb of every notebook, and run it: the copy in rendered/ has the outputs, for reading on the web.

The sources are the .py files. Where jupytext is installed Jupyter opens these, too, and keeps both alike.

    make notebooks                           (some five minutes)
    make notebooks ARGS="2_fisher"
"""

import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def sources(names: list[str]) -> list[Path]:
    """The notebooks of these names; all if there are none."""
    return [HERE / f"{name}.py" for name in names] or sorted(HERE.glob("[0-9]*.py"))


def notebook(source: Path) -> Any:
    """A notebook without outputs, always the same for the same source."""
    found: Any = jupytext.read(source)
    for number, cell in enumerate(found.cells):
        cell["id"] = f"cell-{number}"
    return found


def main(names: list[str]) -> None:
    """Write and run them."""
    for source in sources(names):
        found = notebook(source)
        nbformat.write(found, source.with_suffix(".ipynb"))
        print(f"Running {source.stem}", flush=True)
        NotebookClient(found, timeout=1800, resources={"metadata": {"path": HERE}}).execute()
        for cell in found.cells:
            cell["metadata"].pop("execution", None)  # when each began and ended
        path = HERE / "rendered" / f"{source.stem}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(found, path)
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
