import platform

import pytest

from moe_runtime.errors import PlugInError, StartError
from moe_runtime.launch.node_checks import Expectation, check, expectation, lacking, mistakes
from moe_runtime.ray_backend.node_calls import NodeAnswer
from moe_runtime.ray_backend.placer import NodeShape

EXPECTED = Expectation(
    versions={"python": "3.11.7", "torch": "2.13.0", "fourier": "1.0", "wavelet": None},
    plug_ins={"fourier": "fourier==1.0", "wavelet": "wavelet"},
)
GOOD = {"python": "3.11.7", "torch": "2.13.0", "fourier": "1.0", "wavelet": "7"}


def answer(number: int, **changes: str | None) -> NodeAnswer:
    return NodeAnswer(NodeShape(f"10.0.0.{number}/id{number}", f"id{number}"), {**GOOD, **changes})


def test_nodes_that_have_everything_pass() -> None:
    check(EXPECTED, [answer(1), answer(2, wavelet="8")])


def test_every_difference_is_a_line_with_node_package_expected_and_found() -> None:
    answers = [answer(1, torch="2.12.0"), answer(2), answer(3, fourier=None, wavelet=None)]
    assert mistakes(EXPECTED, answers) == [
        "node 10.0.0.1/id1: expected torch 2.13.0, found 2.12.0; set up that node like this one",
        "node 10.0.0.3/id3: expected fourier 1.0, found none; `--install` installs it, or run "
        "`pip install fourier==1.0` there",
        "node 10.0.0.3/id3: expected wavelet in any version, found none; `--install` installs it, or run "
        "`pip install wavelet` there",
    ]
    assert lacking(EXPECTED, answers) == {"10.0.0.1/id1": ("torch",), "10.0.0.3/id3": ("fourier", "wavelet")}


def test_missing_plug_ins_alone_are_an_error_of_the_plug_ins() -> None:
    with pytest.raises(PlugInError):
        check(EXPECTED, [answer(1, fourier="0.9")])
    with pytest.raises(StartError):
        check(EXPECTED, [answer(1, fourier="0.9"), answer(2, python="3.12.0")])


def test_a_node_without_an_answer_is_told() -> None:
    silent = NodeAnswer(NodeShape("10.0.0.9/id9", "id9"), error="no answer within 60 s")
    with pytest.raises(
        StartError, match=r"^node 10\.0\.0\.9/id9: expected it to say .*, found: no answer within 60 s$"
    ):
        check(EXPECTED, [answer(1), silent])


def test_nodes_must_have_the_versions_of_this_machine_and_the_plug_ins_asked_for() -> None:
    import moe_runtime

    expected = expectation(["no-such-plug-in", "fourier == 1.5"])
    assert expected.versions["python"] == platform.python_version()
    assert expected.versions["moe-runtime"] == moe_runtime.__version__
    assert expected.versions["fourier"] == "1.5"
    assert expected.versions["no-such-plug-in"] is None
    assert expected.plug_ins == {"no-such-plug-in": "no-such-plug-in", "fourier": "fourier == 1.5"}
