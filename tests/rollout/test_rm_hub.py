"""Answer checks."""

import pytest

from slime.rollout.rm_hub import get_checker, math_answers
from ta_opd.errors import ConfigError, ServiceError


@pytest.fixture(scope="module", autouse=True)
def _no_child_is_left():
    yield
    math_answers._child.end()


@pytest.mark.parametrize(
    "response, label, right",
    [("7+5=12;12-3=9;A9", "9", 1), ("7+5=12;A9", "A9", 1), ("A19", "9", 0), ("A1A9", "9", 1), ("9", "9", 1), ("  9 \n", "9", 1),
     ("A-4", "-4", 1), ("A9 and more", "9", 0), ("", "9", 0), ("A9", None, 0)],
)  # fmt: skip
def test_exact(response, label, right):
    assert get_checker("exact")(response, label, {}) == right


@pytest.mark.parametrize(
    "response, label, right",
    [("so 3 and then 1,234.", "#### 1234", 1), ("12.0", "12", 1), ("12 or 13", "12", 0), ("none", "12", 0), ("-5", "5", 0), ("5", None, 0)],
)
def test_last_number(response, label, right):
    assert get_checker("last_number")(response, label, {}) == right


@pytest.mark.parametrize(
    "response, label, right",
    [(r"Thus \boxed{\frac{1}{2}}.", "0.5", 1), ("The answer is 34.", "34", 1), (r"\boxed{x^2+2x+1}", "(x+1)^2", 1), (r"\boxed{35}", "34", 0),
     ("", "34", 0), (r"\boxed{", "34", 0), (r"\boxed{34}", None, 0), (r"first \boxed{1} then \boxed{2}", "2", 1),
     (r"\boxed{7}" + " and more" * 2000, "7", 1), ("text\n\ud800\n" * 900 + r"so \boxed{7}", "7", 1)],
)  # fmt: skip
def test_math(response, label, right):
    assert get_checker("math")(response, label, {}) == right


def test_math_in_a_thread_of_its_own():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(get_checker("math"), r"\boxed{7}", "7", {}).result(30) == 1


def test_an_answer_that_takes_for_ever_is_wrong_and_the_next_one_is_checked(monkeypatch):
    """It kept the manager of a run busy for hours, and could not be interrupted."""
    math_answers._child.end()
    monkeypatch.setattr(math_answers, "_CPU_SECONDS", 0.7)
    check = get_checker("math")
    assert check(r"so \boxed{10^{10^{10}}}", "7", {}) == 0
    assert check(r"so \boxed{(10!)!}", "7", {}) == 0
    assert check(r"\boxed{7}", "7", {}) == 1
    math_answers._child.end()


def test_math_verify_that_does_not_start(monkeypatch):
    math_answers._child.end()
    monkeypatch.setattr(math_answers.sys, "executable", "/bin/false")
    with pytest.raises(ServiceError, match="math-verify did not start"):
        get_checker("math")("7", "7", {})


def test_the_child_finds_packages_where_this_process_was_told_to_look(monkeypatch, tmp_path):
    """A cluster's image may have math-verify on PYTHONPATH alone."""
    math_answers._child.end()
    (tmp_path / "math_verify.py").write_text("parse = lambda text, **_: text\nverify = lambda gold, found, **_: 'seven' in found\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert [get_checker("math")(text, "7", {}) for text in ("seven", "7")] == [1, 0]
    math_answers._child.end()


def test_own_function_and_unknown_name():
    assert get_checker("os.path:join") is __import__("os").path.join
    with pytest.raises(ConfigError, match="unknown check 'exakt'; known: exact, last_number, math"):
        get_checker("exakt")
    with pytest.raises(ConfigError, match="--rm-type"):
        get_checker("no.such:thing")
