"""The documentation site builds with all its pages, and rejects broken links."""

import shutil

import pytest

from tests.commands import REPO, fresh

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(tmp_path):
    """A copy of what the site is built from."""
    for path in (*REPO.glob("*.md"), REPO / "zensical.toml"):
        shutil.copy(path, tmp_path)
    shutil.copytree(REPO / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "mnist_files"))
    return tmp_path


def test_site_has_pages_api_and_notebook(copy):
    assert "No issues found" in fresh("docs/build.py", "out", cwd=copy)
    site = copy / "out"
    pages = [path.stem for path in (REPO / "docs").glob("*.md")] + ["index", "tour", "CONTRIBUTING", "CHANGELOG"]
    assert len(pages) > 15 and all((site / f"{name}.html").stat().st_size > 5000 for name in pages)
    assert 'href="settings.html#loggers"' in (site / "index.html").read_text()  # docs/settings.md in the README
    models = (site / "api" / "models.html").read_text()
    assert 'id="betavae.models.vae.VAE.encode"' in models and "log-variance" in models
    tour = (site / "tour.html").read_text()
    assert tour.count('src="tour_files/') == 4 and len(list((site / "tour_files").iterdir())) == 4
    assert "latent dimensions, bernoulli likelihood" in tour


def test_broken_links_are_errors(copy):
    broken = {
        "README.md": "[x](docs/no_page.md)",
        "docs/numbers.md": "[x](settings.md#no-heading)",
        "CONTRIBUTING.md": "[x](docs/extending.md#no-heading)",
    }
    for file, text in broken.items():
        with open(copy / file, "a") as page:
            page.write(f"\n\n{text}\n")
    shutil.rmtree(copy / "src")  # an empty API reference builds faster
    output = fresh("docs/build.py", "out", cwd=copy, code=1)
    assert "3 issues" in output and not (copy / "out").exists()


def test_missing_images_are_errors(copy):
    with open(copy / "docs" / "numbers.md", "a") as page:
        page.write("\n\n![x](no_picture.png)\n")
    output = fresh("docs/build.py", "out", cwd=copy, code=1)
    assert output == "error: numbers.md shows no_picture.png, which does not exist\n"


def test_other_folders_are_kept(copy):
    (copy / "thesis").mkdir()
    (copy / "thesis" / "chapter.md").write_text("text")
    assert "is not a site of docs/build.py" in fresh("docs/build.py", "thesis", cwd=copy, code=1)
    assert (copy / "thesis" / "chapter.md").read_text() == "text"
