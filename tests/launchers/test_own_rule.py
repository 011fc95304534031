"""A user's own rule through the launchers: it is what runs, and it never runs under the name of another method."""

import shlex

RUN = "scripts/train/run_opd.sh"


def words(done) -> list[str]:
    return shlex.split(done.out.replace("\\\n", " "))


def test_an_own_rule_needs_no_mask(launch, pair_variables):
    variables = pair_variables("4b_to_1p7b") | {"OPD_SELECTOR_PATH": "my_rule.py:mine", "OPD_BUDGET_RATIO": "0.2"}
    command = words(launch(RUN, DRY_RUN="1", check=True, **variables))
    for flag, value in (("--opd-selector-path", "my_rule.py:mine"), ("--opd-budget-ratio", "0.2"), ("--opd-topk-metrics-k", "16")):
        assert command[command.index(flag) + 1] == value
    assert command[command.index("--opd-token-bank-dir") + 1].endswith("/token_bank")


def test_an_own_rule_does_not_run_under_another_name(launch, pair_variables):
    variables = pair_variables("4b_to_1p7b") | {"OPD_SELECTOR_PATH": "my_rule.py:mine", "DRY_RUN": "1"}
    wrapper = launch("scripts/train/run_tip.sh", **variables)
    suite = launch("scripts/train/run_teachability_opd_method_suite.sh", METHOD_LIST="pure_opd:1.0 tip:0.05", SKIP_EVAL="1", **variables)
    for done, mask in ((wrapper, "tip"), (suite, "full")):
        assert done.code == 2 and f"OPD_SELECTOR_PATH=my_rule.py:mine: expected it to be empty beside OPD_BUDGET_MASK={mask}" in done.err


def test_a_profile_counts_without_a_selection_and_what_does_not_count_is_said(launch, pair_variables):
    """The profile decides the loss reduction, too."""
    done = launch(RUN, DRY_RUN="1", OPD_PROFILE="released", OPD_BUDGET_RATIO="0.1", OPD_EXACT_CMASS="1", check=True, **pair_variables("4b_to_1p7b"))
    command = words(done)
    assert command[command.index("--opd-profile") + 1] == "released" and "--opd-budget-ratio" not in command
    assert "OPD_BUDGET_RATIO=0.1 has no effect" in done.err and "OPD_EXACT_CMASS=1 has no effect" in done.err
    assert "no effect" not in launch(RUN, DRY_RUN="1", OPD_BUDGET_MASK="tip", OPD_BUDGET_RATIO="0.1", check=True, **pair_variables("4b_to_1p7b")).err
