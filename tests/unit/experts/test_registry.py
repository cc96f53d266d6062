"""Kinds by name: built in, or registered by a distribution that is really on the path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from moe_runtime.errors import ConfigError, PlugInError
from moe_runtime.experts.kinds.conv import CONV
from moe_runtime.experts.registry import built_in_kinds, check_plug_ins, known_kinds, resolve_kind
from moe_runtime.launch.nested.kinds import REMOTE, register_nested_kinds

if TYPE_CHECKING:
    from conftest import InstallPlugIn

GOOD = """
    from moe_runtime.config.strict import StrictModel
    from moe_runtime.experts import ExpertContract, ExpertKind
    from torch import nn

    class Options(StrictModel):
        pass

    def kind(name):
        return ExpertKind(name, Options, lambda in_shape, options: nn.Identity())
"""


def test_built_in_kind_is_found_by_its_name() -> None:
    assert resolve_kind("conv") is CONV


def test_kinds_that_a_layer_above_registers_are_built_in_however_often_it_does(
    install_plug_in: InstallPlugIn,
) -> None:
    register_nested_kinds()
    register_nested_kinds()
    assert {"moe", "remote", "conv"} <= set(built_in_kinds())
    assert set(built_in_kinds()) <= set(known_kinds())
    assert resolve_kind("remote") is REMOTE
    install_plug_in("moe_plug", {"moe": "KIND"}, source=GOOD + "    KIND = kind('moe')")
    with pytest.raises(PlugInError, match="moe_plug registers the kind 'moe', which is built in"):
        check_plug_ins(["moe_plug"])


def test_mistyped_kind_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="unknown kind 'fed_forward'; did you mean 'feed_forward'"):
        resolve_kind("fed_forward")


def test_kind_unlike_any_other_is_answered_with_all_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown kind 'xyzzy'; known: constant, conv, .*swiglu.* on every node"):
        resolve_kind("xyzzy")


def test_kind_of_a_plug_in_is_found_and_listed(install_plug_in: InstallPlugIn) -> None:
    install_plug_in("good_plug", {"good_kind": "KIND"}, source=GOOD + "    KIND = kind('good_kind')")
    assert "good_kind" in known_kinds()
    assert resolve_kind("good_kind").name == "good_kind"
    check_plug_ins(["good_plug", "good_plug==1.0.0", "good-plug == 1.0.0"])


def test_plug_in_that_is_installed_later_is_found_then(install_plug_in: InstallPlugIn) -> None:
    with pytest.raises(ConfigError, match="late_kind"):
        resolve_kind("late_kind")
    install_plug_in("late_plug", {"late_kind": "KIND"}, source=GOOD + "    KIND = kind('late_kind')")
    assert resolve_kind("late_kind").name == "late_kind"


def test_kind_that_two_plug_ins_register_is_refused(install_plug_in: InstallPlugIn) -> None:
    install_plug_in("twin_one", {"twin_kind": "KIND"}, source=GOOD + "    KIND = kind('twin_kind')")
    install_plug_in("twin_two", {"twin_kind": "KIND"}, source=GOOD + "    KIND = kind('twin_kind')", version="2.0")
    with pytest.raises(PlugInError, match=r"found twin_one 1\.0\.0, twin_two 2\.0; uninstall all but one"):
        resolve_kind("twin_kind")


# Modules stay imported, so each case has a name of its own.
@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("raising", "raise RuntimeError('no licence')", r"loading '\w+:KIND' from \w+ 1\.0\.0 raised RuntimeError"),
        ("lacking", "OTHER = 1", "raised AttributeError"),
        ("odd", "KIND = 1", "to be an ExpertKind, found int"),
        ("misnamed", GOOD + "    KIND = kind('another')", "to have its entry point's name, found 'another'"),
        ("lax", GOOD + "    KIND = ExpertKind('lax_kind', dict, None)", "options from .* to be a StrictModel"),
    ],
)
def test_plug_in_that_does_not_load_is_an_error_that_names_it(
    install_plug_in: InstallPlugIn, name: str, source: str, message: str
) -> None:
    install_plug_in(f"{name}_plug", {f"{name}_kind": "KIND"}, source=source)
    with pytest.raises(PlugInError, match=message) as caught:
        resolve_kind(f"{name}_kind")
    assert f"{name}_plug" in str(caught.value)
    with pytest.raises(PlugInError, match=r"plug_ins\.0: kind"):
        check_plug_ins([f"{name}_plug"])


def test_check_tells_every_plug_in_that_is_missing_or_of_another_version(install_plug_in: InstallPlugIn) -> None:
    install_plug_in("aged_plug", {"aged_kind": "KIND"}, source=GOOD + "    KIND = kind('aged_kind')")
    with pytest.raises(PlugInError) as caught:
        check_plug_ins(["aged_plug==2.0", "missing-plug==1.0", "what is this?", "aged_plug"])
    assert str(caught.value).splitlines() == [
        "plug_ins.0: expected aged_plug 2.0, found 1.0.0; `pip install aged_plug==2.0`",
        "plug_ins.1: expected the distribution 'missing-plug' to be installed, found none; "
        "`pip install missing-plug==1.0`",
        "plug_ins.2: expected `name` or `name==version`, found 'what is this?'",
    ]


def test_distribution_without_experts_is_no_plug_in(install_plug_in: InstallPlugIn) -> None:
    install_plug_in("empty_plug", {})
    with pytest.raises(PlugInError, match="expected empty_plug to register experts in the entry-point group"):
        check_plug_ins(["empty_plug"])


def test_built_in_name_cannot_be_taken_by_a_plug_in(install_plug_in: InstallPlugIn) -> None:
    install_plug_in("thief_plug", {"conv": "KIND"}, source=GOOD + "    KIND = kind('conv')")
    assert resolve_kind("conv") is CONV
    with pytest.raises(PlugInError, match="thief_plug registers the kind 'conv', which is built in"):
        check_plug_ins(["thief_plug"])


def test_example_plug_in_is_installed_and_sound() -> None:
    check_plug_ins(["moe-runtime-example-expert"])
    assert resolve_kind("fourier").name == "fourier"
