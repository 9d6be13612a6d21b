"""Build the documentation site: `python docs/build.py [FOLDER]`. A broken link or a missing image is an error."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

REPO = Path(__file__).parents[1]
SOURCE = REPO / "src" / "betavae"
PROJECT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
# Of the API reference, in this order.
PARTS = ("models", "objectives", "data", "metrics", "module", "optim", "plotting", "applications", "runtime", "sweeps")
PARTS += ("storage", "errors")


def adapt_links(text: str) -> str:
    """Rewrite the links between files of the repository as links between pages of the site."""
    text = re.sub(r"\]\((?:\.\./)?README\.md", "](index.md", text)
    text = re.sub(r"\]\((?:\.\./|docs/)", "](", text)
    return re.sub(r"\.ipynb\)", ".md)", text)


def write_pages(docs: Path) -> None:
    """Write the pages of `docs/`, the README and the other pages of the project."""
    for path in (REPO / "docs").iterdir():
        if path.suffix in (".png", ".svg", ".css"):
            shutil.copy(path, docs)
        elif path.suffix == ".md":
            (docs / path.name).write_text(adapt_links(path.read_text()))
    (docs / "index.md").write_text(adapt_links((REPO / "README.md").read_text()))
    for name in PROJECT_PAGES:
        (docs / name).write_text(adapt_links((REPO / name).read_text()))


def check_images(docs: Path) -> None:
    """Exit if a page shows an image that does not exist. Zensical itself checks only links."""
    for page in docs.glob("*.md"):
        for image in re.findall(r"!\[[^]]*\]\((?!https?:)([^)]+)\)", page.read_text()):
            if not (docs / image).is_file():
                sys.exit(f"error: {page.name} shows {image}, which does not exist")


def write_notebook(path: Path, docs: Path) -> None:
    """Write a notebook with its saved outputs as a page."""
    text, resources = MarkdownExporter().from_notebook_node(
        nbformat.read(path, 4), {"output_files_dir": f"{path.stem}_files"}
    )
    for name, content in resources["outputs"].items():
        (docs / name).parent.mkdir(exist_ok=True)
        (docs / name).write_bytes(content)
    (docs / f"{path.stem}.md").write_text(adapt_links(text))


def write_api(docs: Path) -> list[str]:
    """Write the API reference, one page for each module or package, and return the names of the pages."""
    pages = {part: list_modules(part) for part in PARTS}
    (docs / "api").mkdir()
    lines = [
        "# API reference\n",
        "These pages come from the docstrings of the code.\n",
        "| page | modules |",
        "|---|---|",
    ]
    for part, modules in pages.items():
        directives = "\n\n".join(f"::: {name}" for name in modules)
        (docs / "api" / f"{part}.md").write_text(f"# {part.capitalize()}\n\n{directives}\n")
    lines += [f"| [{part}]({part}.md) | {', '.join(f'`{name}`' for name in pages[part])} |" for part in pages]
    (docs / "api" / "index.md").write_text("\n".join(lines) + "\n")
    return list(pages)


def list_modules(part: str) -> list[str]:
    """List the modules of a part of the package, by their full names."""
    files = [SOURCE / f"{part}.py"] if (SOURCE / f"{part}.py").is_file() else sorted((SOURCE / part).rglob("*.py"))
    parts = [path.relative_to(REPO / "src").with_suffix("").parts for path in files if path.stat().st_size]
    return [".".join(part).removesuffix(".__init__") for part in parts]


def build(folder: Path) -> None:
    """Build the site in a folder, which must be missing, empty or a site that this function built."""
    if folder.exists() and not (folder / "objects.inv").exists() and any(folder.iterdir()):
        sys.exit(f"error: {folder} is not a site of docs/build.py; name an empty folder")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        docs = work / "docs"
        docs.mkdir()
        (work / "src").symlink_to(REPO / "src")
        write_pages(docs)
        for notebook in (REPO / "docs").glob("*.ipynb"):
            write_notebook(notebook, docs)
        check_images(docs)
        nav = ['"api/index.md"', *(f'"api/{part}.md"' for part in write_api(docs))]
        settings = (REPO / "zensical.toml").read_text().replace('"api/"', f"[{', '.join(nav)}]")
        (work / "zensical.toml").write_text(settings)
        subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=work, check=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(work / "site", folder)
    print(f"the site is {folder}/index.html")


if __name__ == "__main__":
    build(Path(next(iter(sys.argv[1:]), REPO / "site")))
