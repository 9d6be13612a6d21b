import pytest

from betavae.data.file_listing import (
    as_text,
    describe_others,
    index_names,
    list_image_files,
    png_filenames,
    split_folders,
)
from betavae.errors import UserError


def test_links_are_followed_and_no_file_is_listed_twice(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside / "inner", root / "b"):
        folder.mkdir(parents=True)
    for path in (root / "b" / "real.png", outside / "inner" / "far.png", outside / "blob"):
        path.write_bytes(b"1")
    for name, target in {
        "a": root / "b",
        "alias.png": root / "b" / "real.png",
        "b/alias.png": "real.png",
        "b/up": root,
        "here": ".",
        "far10": outside / "inner",
        "far9": outside / "inner",
        "blob.png": outside / "blob",
        "lost.png": outside / "nothing",
    }.items():
        (root / name).symlink_to(target)
    found, _ = list_image_files(root)
    assert [file.name for file in found] == ["b/real.png", "blob.png", "far9/far.png", "lost.png"]
    assert [file.size for file in found] == [1, 1, 1, 0]


def test_only_visible_image_files_are_listed(tmp_path):
    for name in ("a.PNG", "notes.txt", "c/more.TXT", "LICENSE", ".hidden.png", "._a.png", ".git/b.png", "c/d.JPeG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "link.csv").symlink_to(tmp_path / "notes.txt")
    found, others = list_image_files(tmp_path)
    assert [file.name for file in found] == ["a.PNG", "c/d.JPeG"]
    assert others == {".txt": 2, "": 1, ".csv": 1}
    text = "4 files were skipped for their suffix: 2 .txt, 1 without a suffix, 1 .csv"
    assert sorted(describe_others(others)) == sorted(text)


def test_no_two_images_become_one_file():
    assert png_filenames(["7.jpg", "7.png", "sub/7"], "out") == ["7.jpg.png", "7.png", "sub/7.png"]
    for names in (["x.jpg", "x.jpg.png"], ["x.png", "x.png"]):
        with pytest.raises(UserError, match="would be one file, x"):
            png_filenames(names, "out")
    for name in ("../x.png", "/x.png", "a/../../x"):
        with pytest.raises(UserError, match="leads out of out"):
            png_filenames(["fine.png", name], "out")


def test_names_are_written_as_text():
    assert as_text(b"caf\xe9/\xff.png".decode("utf-8", "surrogateescape")) == r"caf\xe9/\xff.png"
    assert as_text("猫.png") == "猫.png"
    assert index_names(11) == [f"{i:02}" for i in range(11)]


def test_folders_are_splits_only_if_all_are_named_so():
    assert split_folders(["train/a", "Val/b", "test/c/d", "e"]) == {
        "train": "train",
        "Val": "validation",
        "test": "test",
    }
    assert split_folders(["train/a", "bus/b"]) == split_folders(["a"]) == {}
