"""Writes the launch badge and the first cell of every notebook: python -m docs.notebooks

ADDRESS is the one place that knows where the repository is hosted.
"""

import json
from pathlib import Path

ADDRESS = "https://github.com/OWNER/piflow-minimal"
FOLDER = Path(__file__).resolve().parent.parent / "notebooks"

FIRST_CELL = f'''\
# Finds the repository: in this folder, above it, directly below it, or above this notebook.
import os
import sys
from pathlib import Path

notebook = os.environ.get("JPY_SESSION_NAME") or globals().get("__vsc_ipynb_file__") or "."
below = sorted(Path.cwd().glob("*"))
places = [Path.cwd(), *Path.cwd().parents, *below, *Path(notebook).resolve().parents]
found = [place for place in places if os.path.isfile(place / "common" / "plots.py")]
if not found:
    raise FileNotFoundError("the repository is missing; run once:  !git clone {ADDRESS}")
sys.path.insert(0, str(found[0]))'''


def badge(name: str) -> str:
    """The line below the title of notebooks/`name` that opens it on a hosted machine."""
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    place = ADDRESS.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{name}"
    return f"[![Open in Colab]({image})]({link})"


def prepared(name: str, title: str) -> str:
    """The first markdown cell with its badge; title: the cell, with or without a badge."""
    lines = title.splitlines()
    rest = "\n".join(line for line in lines[1:] if not line.startswith("[!["))
    return f"{lines[0]}\n\n{badge(name)}\n\n{rest.strip()}"


def main() -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text("utf-8"))
        title, code = notebook["cells"][:2]
        title["source"] = prepared(path.name, "".join(title["source"])).splitlines(keepends=True)
        code["source"] = FIRST_CELL.splitlines(keepends=True)
        text = json.dumps(notebook, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
