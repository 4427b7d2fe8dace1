"""Make HTML pages of all notebooks, and README.md of the index, without the quarto binary, and check every link.

    python tests/tools/pages.py [--out FOLDER] [--readme]

Notebooks go through nbdev's own page processing first, so a cell that fails there fails here. Pages are written by
pandoc, whose markdown is Quarto's; any warning of pandoc is an error. Theme, navigation and search need the real Quarto.
"""
import argparse
import base64
import json
import os
import posixpath
import re
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pypandoc
import yaml

ROOT = Path(__file__).resolve().parents[2]
OPTION = re.compile(r"^#\|\s*([\w-]+):\s*(.*)$")
LINK = re.compile(r"(?<!!)\]\(([^)\s]+)\)")


class BrokenPages(Exception):
    "A page could not be made, or a link leads nowhere."


def pandoc(text: str, *arguments: str) -> str:
    "Run pandoc on `text`; a warning counts as an error."
    run = subprocess.run([pypandoc.get_pandoc_path(), "--fail-if-warnings", *arguments],
                         input=text, text=True, capture_output=True, encoding="utf-8")
    if run.returncode:
        raise BrokenPages(f"pandoc: {run.stderr.strip()}")
    return run.stdout


# --- notebook -> markdown --------------------------------------------------------------------------------------

def cell_markdown(cell: dict, images: Path, where: str) -> list[str]:
    "One processed cell as markdown blocks; PNG outputs become files under `images`."
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return [source]
    lines = source.splitlines()
    options = {m[1]: m[2].strip('"') for line in lines if (m := OPTION.match(line))}
    code = "\n".join(line for line in lines if not OPTION.match(line)).strip()
    if options.get("include") == "false":
        return []
    blocks = [f"```python\n{code}\n```"] if code and options.get("echo") != "false" else []
    if options.get("output") == "false":
        return blocks
    for number, output in enumerate(cell.get("outputs", [])):
        if output["output_type"] == "error":
            raise BrokenPages(f"{where}: a stored output is an error: {output['ename']}: {output['evalue']}")
        if output["output_type"] == "stream":
            text = "".join(output["text"])
            blocks.append(text if options.get("output") == "asis" else f"````\n{text}\n````")
            continue
        data = {kind: value if isinstance(value, str) else "".join(value) for kind, value in output["data"].items()}
        if "text/markdown" in data:
            blocks.append(data["text/markdown"])
        elif "image/png" in data:
            images.mkdir(parents=True, exist_ok=True)
            file = images / f"{cell['id']}-{number}.png"
            file.write_bytes(base64.b64decode(data["image/png"]))
            blocks.append(f"![{options.get('fig-alt', '')}]({images.name}/{file.name})")
        elif "text/html" in data:
            blocks.append("```{=html}\n" + data["text/html"] + "\n```")
        elif "text/plain" in data:
            blocks.append("````\n" + data["text/plain"] + "\n````")
    return blocks


def to_markdown(notebook: Path, folder: Path) -> tuple[dict, str]:
    "The front matter and the markdown body of a processed notebook; its images go to `folder`."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    blocks = [block for number, cell in enumerate(cells)
              for block in cell_markdown(cell, folder / f"{notebook.stem}_files", f"{notebook.name}, cell {number}")]
    text = "\n\n".join(blocks)
    if not text.startswith("---\n"):
        raise BrokenPages(f"{notebook.name}: no title cell (a heading and one `>` line, alone in the first cell)")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), re.sub(r"<!-- WARNING.*?-->", "", body, flags=re.S)


def page_name(notebook: str) -> str:
    "Where the page of a notebook is written, relative to the site: `tutorials/01_x.ipynb` -> `tutorials/x.html`."
    folder, name = posixpath.split(notebook)
    return posixpath.join(folder, re.sub(r"^\d+[a-zA-Z]?_", "", name.removesuffix(".ipynb")) + ".html")


def relink(markdown: str, change) -> str:
    "Give every relative link to a notebook a new target."
    def new(match: re.Match) -> str:
        target, mark, fragment = match[1].partition("#")
        local = target.endswith(".ipynb") and "://" not in target
        return f"]({change(target)}{mark}{fragment})" if local else match[0]
    return LINK.sub(new, markdown)


def make_pages(site: Path) -> list[str]:
    "Process all notebooks and write their pages below `site`."
    from nbdev.config import get_config
    from nbdev.serve import proc_nbs

    os.chdir(ROOT)  # where nbdev looks for settings.ini
    proc_nbs(force=True, n_workers=2)
    cache, pages = get_config().config_path / "_proc", []
    for notebook in sorted(cache.rglob("*.ipynb")):
        relative = notebook.relative_to(cache).as_posix()
        page = page_name(relative)
        file = site / page
        if page in pages:
            raise BrokenPages(f"two notebooks make the page {page}; the second is {relative}")
        file.parent.mkdir(parents=True, exist_ok=True)
        front, body = to_markdown(notebook, file.parent)
        if front.get("output-file", file.name) != file.name:
            raise BrokenPages(f"{relative}: nbdev writes {front['output-file']}, not {file.name}")
        title = ["--metadata", f"title={front['title']}"]
        html = pandoc(relink(body, page_name), "-f", "markdown", "-t", "html5", "-s", "--toc", "--mathml", *title)
        file.write_text(html, encoding="utf-8")
        pages.append(page)
    return pages


def readme_text(site: Path) -> str:
    "README.md as made from the processed index notebook."
    front, body = to_markdown(ROOT / "_proc" / "index.ipynb", site)
    body = relink(body, lambda target: posixpath.join("nbs", target))
    note = "<!-- Made from nbs/index.ipynb by tests/tools/pages.py --readme; edit the notebook. -->"
    return pandoc(f"{note}\n\n# {front['title']}\n\n> {front['description']}\n\n{body}",
                  "-f", "markdown-smart", "-t", "gfm", "--wrap=none")


# --- links -----------------------------------------------------------------------------------------------------

class Links(HTMLParser):
    "The ids of a page, and what it links to."

    def __init__(self, html: str):
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.ids.add(value or "")
            if (tag, name) in {("a", "href"), ("img", "src"), ("link", "href"), ("script", "src")}:
                self.targets.append(value or "")


def broken_links(pages: dict[str, Links], exists, doc_url: str) -> list[str]:
    """The links of `pages` that lead nowhere: files `exists` does not know, and ids that their page does not have.

    A link to the documentation site (`doc_url`) is looked up among the pages; other addresses are left alone."""
    bad = []
    base = urlsplit(doc_url).path.rstrip("/") + "/"
    for name, page in pages.items():
        for target in page.targets:
            address, fragment = urldefrag(target)
            if address.startswith(doc_url):
                address = address[len(doc_url):].lstrip("/") or "index.html"
            elif address.startswith(base):
                address = address[len(base):] or "index.html"
            elif urlsplit(address).scheme:
                continue
            elif address:
                address = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(address)))
            address = address or name
            if address in pages:
                if fragment and unquote(fragment) not in pages[address].ids:
                    bad.append(f"{name}: {target} (no such id in {address})")
            elif not exists(address):
                bad.append(f"{name}: {target} (no such file)")
    return bad


def check_links(site: Path, names: list[str], readme: str) -> tuple[int, list[str]]:
    "How many links the pages and README.md hold, and those that lead nowhere."
    from nbdev.config import get_config

    doc_url = get_config().doc_host + get_config().doc_baseurl
    pages = {name: Links((site / name).read_text(encoding="utf-8")) for name in names}
    bad = broken_links(pages, lambda address: (site / address).is_file(), doc_url)
    front = Links(pandoc(readme, "-f", "gfm", "-t", "html5"))
    bad += [line for line in broken_links({**pages, "README.md": front}, lambda a: (ROOT / a).exists(), doc_url)
            if line.startswith("README.md: ")]
    return sum(len(page.targets) for page in (*pages.values(), front)), bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep the pages in this folder (default: a temporary one)")
    parser.add_argument("--readme", action="store_true", help="write README.md; without it, compare")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        site = (options.out or Path(scratch)).resolve()
        try:
            names = make_pages(site)
            made = readme_text(site)
        except BrokenPages as error:
            print(error)
            return 1
        readme = ROOT / "README.md"
        if options.readme:
            readme.write_text(made, encoding="utf-8")
        count, bad = check_links(site, names, made)
        if readme.read_text(encoding="utf-8") != made:
            bad.append("README.md is not what nbs/index.ipynb gives: run `python tests/tools/pages.py --readme`")
        print("\n".join([f"{len(names)} pages, {count} links, {len(bad)} broken", *bad]))
        return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
