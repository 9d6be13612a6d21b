import tracemalloc

import numpy as np
import pytest
import torch

from betavae.data.datasets.table import load_table, read_table
from betavae.errors import UserError
from betavae.storage.files import write_csv


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_file_has_columns_and_a_label(tmp_path, separator):
    path = write(tmp_path / "t.csv", '\ufeff"a b",kind,c\n1,x,2.5\n\n-3e2,y,0\n0.1,x, 7 \n'.replace(",", separator))
    table = read_table(path, label="kind")
    assert table.columns == ["a b", "c"] and table.labels.tolist() == ["x", "y", "x"]
    assert table.values.dtype == torch.float64 and table.values.shape == (3, 2, 1, 1)
    assert table.values.flatten(1).tolist() == [[1, 2.5], [-300, 0], [0.1, 7]]
    assert read_table(path, ["c"]).values.flatten().tolist() == [2.5, 0, 7]
    assert read_table(path, ["c", "a b"]).columns == ["c", "a b"]  # in this order


def test_a_csv_file_without_a_header_has_numbered_columns(tmp_path):
    path = write(tmp_path / "t.csv", "1,2,5\n3,4,6\n")
    table = read_table(path, label=2)
    assert table.columns == ["0", "1"] and table.values.flatten(1).tolist() == [[1, 2], [3, 4]]
    assert table.labels.tolist() == [5, 6] and table.labels.dtype == np.int64


def test_a_header_of_an_unnamed_array_is_no_row(tmp_path):
    path = write(tmp_path / "t.csv", "0,1,2\n5,6,7\n")
    assert read_table(path).columns == ["0", "1", "2"] and read_table(path).values.flatten().tolist() == [5, 6, 7]


def test_numbers_may_be_names_beside_a_text(tmp_path):
    table = read_table(write(tmp_path / "t.csv", "id,400,410\n01,1,2\n1,3,4\n"), label="id")
    assert table.columns == ["400", "410"] and table.labels.tolist() == ["01", "1"]


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (["1", "1.0", "-2"], [1, 1, -2]),
        (["1", "1.0", "N/A"], ["1", "1", "N/A"]),  # no label depends on the others
        ([".5", "1.0", "2.50", "1.10", "1.1"], [".5", "1", "2.50", "1.10", "1.1"]),
        (["123456789012345678.0", "123456789012345679"], [123456789012345678, 123456789012345679]),
        (["-0.0", "+3."], [0, 3]),
        (["175928847299117063", "175928847299117064"], [175928847299117063, 175928847299117064]),
        (["1" * 20, "2"], ["1" * 20, "2"]),
        (["1e3", "1000"], ["1e3", "1000"]),
        (["true", "False", "TRUE"], ["True", "False", "True"]),
        (["true", "no", "e", "."], ["True", "no", "e", "."]),
        (["1_0", "2"], ["1_0", "2"]),
        (["1", ""], ["1", ""]),
        (["nan", "1"], ["", "1"]),
    ],
)
def test_a_label_of_a_table_has_one_spelling(tmp_path, texts, labels):
    rows = "".join(f"{text},{i}\n" for i, text in enumerate(texts))
    found = read_table(write(tmp_path / "t.csv", f"kind,a\n{rows}"), label="kind").labels.tolist()
    assert found == labels and list(map(type, found)) == list(map(type, labels))


def test_texts_with_underscores_are_no_numbers(tmp_path):
    assert read_table(write(tmp_path / "t.csv", "2023_01,2023_02\n1,2\n")).columns == ["2023_01", "2023_02"]
    with pytest.raises(UserError, match="column id has '12_7' in row 0"):
        read_table(write(tmp_path / "t.csv", "id,x\n12_7,2\n"))


def test_true_and_false_are_numbers(tmp_path):
    table = read_table(write(tmp_path / "t.csv", "a,b\nTrue,0.5\nFalse,1\n"))
    assert table.values.flatten().tolist() == [1, 0.5, 0, 1]


def test_quoted_names_may_have_the_other_separators(tmp_path):
    table = read_table(write(tmp_path / "t.csv", '"a,b";"c,d"\n1;2\n'))
    assert table.columns == ["a,b", "c,d"] and table.values.flatten().tolist() == [1, 2]


def test_one_long_text_does_not_widen_the_other_cells(tmp_path):
    path = write(tmp_path / "t.csv", "a,b,note\n" + f"1,2,{'x' * 100_000}\n" + "1,2,y\n" * 1000)
    tracemalloc.start()
    assert len(read_table(path, ["a", "b"]).values) == 1001
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20  # as NumPy's texts they would take 1.2 GB


def test_missing_labels_are_rejected_for_training_only(tmp_path):
    path = write(tmp_path / "t.csv", "a,y\n" + "1,u\n" * 20 + "2,\n")
    with pytest.raises(UserError, match="column y, the label, has no value in row 20; fill it in"):
        load_table(path, "train", label="y")
    assert read_table(path, label="y").labels.tolist() == ["u"] * 20 + [""]


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "uint16"])
def test_an_array_has_numbered_columns(tmp_path, dtype):
    array = np.array([[0, 1, 2], [1, 0, 5]]).astype(dtype)
    np.save(tmp_path / "t.npy", array)
    table = read_table(tmp_path / "t.npy", label=0)
    assert table.columns == ["1", "2"] and table.labels.tolist() in ([0, 1], ["False", "True"])
    assert np.array_equal(table.values.flatten(1).numpy(), array[:, 1:])


def test_the_mark_of_own_files_is_no_column(tmp_path):
    write_csv(tmp_path / "t.csv", {"a": [1, 2], "b": [3, 4]})
    table = read_table(tmp_path / "t.csv")
    assert table.columns == ["a", "b"] and table.values.flatten().tolist() == [1, 3, 2, 4]


def test_a_parquet_file_is_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"a": [1, 2], "b": [0.5, None], "k": ["u", "v"]}), tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet", ["a"], "k")
    assert table.values.flatten().tolist() == [1, 2] and table.labels.tolist() == ["u", "v"]
    with pytest.raises(UserError, match="column b has no value in row 1"):
        read_table(tmp_path / "t.parquet", ["b"])
    times = pa.array([None, 0], pa.timestamp("us"))
    parquet.write_table(pa.table({"time": times, "y": ["u", None]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"column time has '1970-.*' in row 1: expected numbers|column time has 'NaT'"):
        read_table(tmp_path / "t.parquet", label="y")
    parquet.write_table(pa.table({"x": [0.5], "__index_level_0__": [246]}), tmp_path / "t.parquet")  # as pandas does
    with pytest.raises(UserError, match="column 2 has no name, as a column of row numbers"):
        read_table(tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet", ["x"]).values.item() == 0.5
    write(tmp_path / "t.parquet", "PAR1")
    with pytest.raises(UserError, match="is not an intact Parquet file"):
        read_table(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("a,b\n1,x\n2,3\n4,y\n", {}, "column b has 'x' in row 0, and in 1 more rows: expected numbers; .*data.label=b"),
        ("a,b\n1,2\n3,\n", {}, "column b has no value in row 1; fill in"),
        (",b\n1,2\n3,4\n", {}, "column 1 has no name, as a column of row numbers; name it, remove it, or name"),
        ("a,b\n1,2\n", {"columns": ["a", "a"]}, "data.columns has a twice"),
        ("a,b\n1,2\n3,NaN\n", {}, "column b has no value in row 1"),
        ("a,b\n1,2\n3,inf\n", {}, "column b has 'inf' in row 1"),
        ("a,b\n1,2\n3\n", {}, "row 1 has 1 values: expected 2"),
        ("a,a\n1,2\n", {}, "several columns named 'a'"),
        ("a,b\n1,2\n", {"label": "c"}, r"has no column c \(it has a, b\)"),
        ("a,b\n1,2\n", {"columns": ["a", "d"]}, "has no column d"),
        ("a,b\n", {}, "has no rows"),
        ("a\n1\n", {"label": "a"}, "has no columns of numbers"),
        ("", {}, "is empty"),
        ("4.7,5.3,cat\n1,2,dog\n3,4,cat\n", {"label": "cat"}, "has no header: add a first row"),
    ],
)
def test_invalid_tables_are_rejected_by_column_and_row(tmp_path, text, settings, message):
    with pytest.raises(UserError, match=message):
        read_table(write(tmp_path / "t.csv", text), **settings)


def test_other_files_are_no_tables(tmp_path):
    np.save(tmp_path / "t.npy", np.zeros((3, 2, 2)))
    (tmp_path / "t.txt").touch()
    for name, message in {
        "t.npy": r"\(3, 2, 2\): expected numbers",
        "t.txt": "not a table",
        "no.csv": "not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            read_table(tmp_path / name)


def test_splits_keep_rows_labels_and_columns(tmp_path):
    rows = "\n".join(f"{i},{i * i},{'even' if i % 2 == 0 else 'odd'}" for i in range(40))
    path = write(tmp_path / "t.csv", f"n,square,parity\n{rows}\n")
    train, test = (load_table(path, split, "parity", test_size=8) for split in ("train", "test"))
    assert (len(train), len(test)) == (32, 8) and load_table(path, "validation") is None
    assert train.columns == test.columns == ["n", "square"] and test.classes == ["even", "odd"]
    for images in (train, test):
        n, square = images.tensor().flatten(1).T
        assert torch.equal(square, n * n) and torch.equal(images.labels, n.long() % 2)
    assert not set(train.tensor()[:, 0].flatten().tolist()) & set(test.tensor()[:, 0].flatten().tolist())
