"""Answer checks of evaluation, by the name of --rm-type: is a response right, given the label of its prompt?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slime.rollout.rm_hub.answers import exact_match, last_number_match
from slime.rollout.rm_hub.math_answers import math_match
from slime.utils.misc import load_function
from ta_opd.errors import ConfigError

Checker = Callable[[str, str | None, dict[str, Any]], float]
CHECKERS: dict[str, Checker] = {"exact": exact_match, "last_number": last_number_match, "math": math_match}


def get_checker(name: str) -> Checker:
    """The check named `name`, or the user's own function (response, label, metadata) -> score at package.module:function."""
    if name in CHECKERS:
        return CHECKERS[name]
    if ":" in name or "." in name:
        return load_function(name, "--rm-type")
    raise ConfigError(f"--rm-type: unknown check {name!r}; known: {', '.join(CHECKERS)}, or package.module:function")
