"""Plugins register names when they are imported, and only then."""

import sys

import pytest

from betavae.errors import UserError
from betavae.models.networks import NETWORKS, MLPDecoder, MLPEncoder
from betavae.runtime import plugins
from betavae.runtime.plugins import LOADED, describe_missing, load_plugins

REGISTER = (
    "from betavae.models.networks import NETWORKS, MLPDecoder, MLPEncoder\nNETWORKS['{}'] = (MLPEncoder, MLPDecoder)\n"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, for modules; registries and imports are restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    modules, networks = dict(sys.modules), dict(NETWORKS)
    yield tmp_path
    LOADED.clear()
    for name in sys.modules.keys() - modules:
        del sys.modules[name]
    NETWORKS.clear()
    NETWORKS.update(networks)


def test_a_module_of_the_current_directory_registers(folder):
    (folder / "custom_net.py").write_text(REGISTER.format("custom"))
    load_plugins(["custom_net"])
    load_plugins(["custom_net"])
    assert NETWORKS["custom"] == (MLPEncoder, MLPDecoder) and LOADED == {"custom_net": ""}
    assert describe_missing({"custom_net": ""}) == ""


def test_a_name_that_is_taken_is_rejected_and_stays(folder):
    mlp = NETWORKS["mlp"]
    (folder / "thief.py").write_text(REGISTER.format("mlp"))
    with pytest.raises(UserError, match="plugin thief: mlp in NETWORKS is taken; register another name"):
        load_plugins(["thief"])
    assert NETWORKS["mlp"] is mlp and not LOADED


@pytest.mark.parametrize(
    ("code", "reason"), [("1/0", "ZeroDivisionError: division"), ("import nots", "ModuleNotFound")]
)
def test_a_failed_import_names_plugin_and_error(folder, code, reason):
    (folder / "broken.py").write_text(code)
    with pytest.raises(UserError, match=f"plugin broken: its import failed with {reason}"):
        load_plugins(["broken"])


@pytest.mark.parametrize("value", ["custom_net", [1], [""], None, {"a": "b"}])
def test_plugins_must_be_a_list_of_modules(folder, value):
    with pytest.raises(UserError, match=r"expected a list of modules, such as plugins=\[mypkg.nets\]"):
        load_plugins(value)


def test_an_entry_point_must_name_a_module(folder, monkeypatch):
    point = plugins.EntryPoint("extra", "extra.nets:register", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    with pytest.raises(UserError, match=r"its entry point is extra.nets:register, expected a module"):
        load_plugins()


def test_missing_plugins_say_what_to_install_and_pass():
    recorded = {"extra.nets": "extra 1.0", "mypkg.nets": "", "mypkg.data": ""}
    text = "trained with the plugins extra.nets, mypkg.nets, mypkg.data; install extra 1.0 and pass 'plugins="
    assert describe_missing(recorded) == text + "[mypkg.nets,mypkg.data]'"
    assert describe_missing({}) == describe_missing(None) == describe_missing(["x"]) == ""


@pytest.mark.parametrize("recorded", [{"a": ["b"]}, {1: ""}, {"x]'; rm -rf ~": ""}, {"x": "p\nq"}, {"x": {}}])
def test_recorded_plugins_of_any_content_are_left_out(recorded):
    assert describe_missing(recorded) == ""
