"""Re-run notebooks in place and keep their outputs, honouring `eval: false` and the test flags.

    python tests/tools/refresh.py nbs/10_data.filters.ipynb ...
    python tests/tools/refresh.py --flags slow nbs/tutorials/01_quickstart.ipynb

A notebook that fails is left as it was. Progress bars are not kept: they say how fast this machine is.
"""
import argparse
import os
import re
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import clean_nb
from nbdev.config import get_config

BAR = re.compile(r"\d+%\|")


def is_progress(output: dict) -> bool:
    "Whether a stored output is a progress bar on the error stream."
    return output.get("name") == "stderr" and bool(BAR.search("".join(output.get("text", ""))))


def refresh(notebook: Path, run_flags: tuple[str, ...] = ()) -> None:
    "Execute one notebook and store what its cells print and show."
    skip = set(get_config().tst_flags.split()) - set(run_flags)
    names = "|".join(["eval:\\s*false", *map(re.escape, sorted(skip))])
    flag = re.compile(rf"^#\|\s*(?:{names})\s*$", re.M)

    def leave_out(cell) -> bool:
        return cell.cell_type != "code" or bool(flag.search(cell.source)) or "nbdev_export(" in cell.source

    nb, shell, before = read_nb(notebook), CaptureShell(notebook), os.getcwd()
    os.chdir(notebook.parent)
    try:
        shell.run_all(nb, exc_stop=True, preproc=leave_out)
    finally:
        os.chdir(before)
    for cell in nb.cells:
        if cell.get("outputs"):
            cell.outputs = [output for output in cell.outputs if not is_progress(output)]
    clean_nb(nb, allowed_cell_metadata_keys=get_config().allowed_cell_metadata_keys.split())
    write_nb(nb, notebook)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Re-run notebooks in place and keep their outputs.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--flags", default="", help="also run the cells with these test flags, for example: slow")
    options = parser.parse_args()
    for name in options.notebooks:
        refresh(name.absolute(), tuple(options.flags.split()))
