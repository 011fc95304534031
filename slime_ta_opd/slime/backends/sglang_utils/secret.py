"""A string that does not show itself."""

import sys

API_KEY_VARIABLE = "SLIME_SGLANG_API_KEY"


class Secret(str):
    """Behaves as the string it is everywhere but in `repr`, which is what reaches logs through dataclasses."""

    def __repr__(self) -> str:
        return "'***'"

    def __reduce__(self):
        return Secret, (str.__str__(self),)


def hide(secret: str) -> None:
    """Takes `secret` out of this process's line in process lists, where it stands among the arguments."""
    if any(secret in word for word in sys.argv):
        import setproctitle

        setproctitle.setproctitle(setproctitle.getproctitle().replace(secret, "***"))
