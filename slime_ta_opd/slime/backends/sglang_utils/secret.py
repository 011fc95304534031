"""A string that does not show itself."""

API_KEY_VARIABLE = "SLIME_SGLANG_API_KEY"


class Secret(str):
    """Behaves as the string it is everywhere but in `repr`, which is what reaches logs through dataclasses."""

    def __repr__(self) -> str:
        return "'***'"

    def __reduce__(self):
        return Secret, (str.__str__(self),)
