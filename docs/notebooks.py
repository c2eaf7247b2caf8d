"""Prepares the stored notebooks, after they ran: python -m docs.notebooks [NAME.ipynb ...]

Writes the launch badge and the first cell, and makes stored figures smaller (128 colours).
ADDRESS is the one place that knows where the repository is hosted.
"""

import base64
import io
import json
import sys
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


def shrink(png: str) -> str:
    """A picture, base64, with at most 128 colours, among them those of thin lines."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == "P":
        return png
    options = {"method": Image.Quantize.MAXCOVERAGE, "dither": Image.Dither.NONE}
    image = image.convert("RGB").quantize(128, **options)
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(names: list[str]) -> None:
    """Writes badge and first cell into notebooks, all of them if none is named."""
    for path in [FOLDER / name for name in names] or sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text("utf-8"))
        title, code = notebook["cells"][:2]
        title["source"] = prepared(path.name, "".join(title["source"])).splitlines(keepends=True)
        code["source"] = FIRST_CELL.splitlines(keepends=True)
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    output["data"]["image/png"] = shrink("".join(output["data"]["image/png"]))
        text = json.dumps(notebook, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
