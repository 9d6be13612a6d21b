"""Settings of a run folder are read back unchanged, and nothing in a YAML file is executed."""

import functools

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from betavae.errors import UserError
from betavae.runtime.hydra_config import to_plain
from betavae.runtime.resume import load_resumed_config
from betavae.runtime.run_folder import RUN, RunFolder, claim_folder
from betavae.runtime.yaml_files import MAX_BYTES, read_yaml, write_yaml
from tests.commands import REPO

EXPERIMENTS = sorted(path.stem for path in (REPO / "configs" / "experiment").glob("*.yaml"))
# Texts that YAML may read as numbers, dates, booleans, interpolations or markup.
WORDS = ["1e3", "1_0", "010", "0x10", "1:30", "2020-01-01", "yes", "null", "~", "=", "<<", "${seed}", "${", "\\${x}"]
TEXT = (
    st.sampled_from([*WORDS, "${oc.env:HOME}", "'", '"', "#", "a: b", "- a", "!!int 1", "&a", "*a", "\n", " ", "\x85"])
    | st.from_regex(r"[-+]?[0-9_]*\.?[0-9_]*[eE]?[-+]?[0-9_:]*", fullmatch=True)
    | st.text(st.characters(codec="utf-8"), max_size=90)
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


@functools.cache
def composed(experiment):
    with initialize_config_dir(str(REPO / "configs"), version_base="1.3"):
        return compose("train", [f"experiment={experiment}"])


def types(value):
    if isinstance(value, dict):
        return {key: types(inner) for key, inner in value.items()}
    return [types(inner) for inner in value] if isinstance(value, list) else type(value)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    experiment=st.sampled_from(EXPERIMENTS),
    name=TEXT | st.integers() | st.floats(allow_nan=False),
    root=TEXT.filter(bool),
    extra=st.dictionaries(st.text("abc", min_size=4), VALUES, max_size=3),
    callback=st.dictionaries(st.text("abc", min_size=1), VALUES, max_size=3),
)
def test_settings_are_read_back_unchanged(tmp_path_factory, experiment, name, root, extra, callback):
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    claim_folder(folder.path, RUN, "key")
    written = to_plain(composed(experiment)) | {"name": name}
    for group in ("model", "data", "objective", "beta_schedule", "optimizer", "trainer"):
        written[group] |= extra
    written["data"]["root"] = root
    written["callbacks"]["custom"] = {"mine": callback}
    write_yaml(folder.path / "config.yaml", written)
    found, state = load_resumed_config(folder, composed(experiment), [])
    assert state is None and found.pop("resume") == str(folder.path)
    del written["resume"]
    assert found == written and types(found) == types(written)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x",
        "a: [",
        "[" * 9999,
        "a: " + "9" * 5000,
        "!!python/object/apply:os.system [ls]",
        "a: !!timestamp x",
        "? [1]: 2",
        "a: \x00",
        "#" * (MAX_BYTES + 1),
    ],
)
def test_a_damaged_or_hostile_file_is_rejected(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml is not a valid YAML file: .") as caught:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(caught.value)
