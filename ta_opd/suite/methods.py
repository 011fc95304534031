"""Names of a suite: METHOD_LIST and RUN_LIST entries, budget tags, seed labels.

A tag says a budget without doubt: r0p05 is 5 %. The released launchers dropped the dot (005 for 0.05), which readers took
for half a percent; `read_budget_tag` reads both.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ta_opd.errors import ConfigError, TaOpdError
from ta_opd.selection import MASK_CHOICES, METHOD_ALIASES, resolve_mask

FULL_NAMES = ("none", "full", "full_opd", "pure_opd")
MASK_NOTES = {
    "full": "every valid response token",
    "dlearn_high": "highest learnable disagreement D_norm x C_norm",
    "entropy": "highest student entropy",
    "ca_softor": "soft-OR of entropy and learnable disagreement",
    "split_budget_ca": "budget split between entropy and confident learnable disagreement",
    "tip": "soft-OR of entropy and raw divergence",
    "divergence": "highest raw divergence",
    "random": "drawn at random",
    "compatibility": "highest compatibility C",
    "q3": "low entropy and high divergence",
    "q3_highc": "highest compatibility inside Q3",
}


@dataclass(frozen=True)
class Entry:
    """One METHOD_LIST entry. `ratio` is the share of valid tokens asked for; `index` only orders and offsets ports."""

    method: str
    mask: str
    ratio: float
    index: int

    @property
    def notes(self) -> str:
        return MASK_NOTES.get(self.mask, "")


@dataclass(frozen=True)
class Seeds:
    """Seeds of one repetition: trainer, prompt order and sampling, random mask."""

    label: str
    train: int
    rollout: int
    mask: int


def resolve_method(name: str) -> str:
    """Mask of a method alias or mask name. Raises ConfigError with the nearest known name."""
    if name in FULL_NAMES:
        return "full"
    try:
        return resolve_mask(METHOD_ALIASES.get(name, name))
    except (TaOpdError, KeyError, ValueError):
        known = sorted({*METHOD_ALIASES, *FULL_NAMES, *MASK_CHOICES})
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"unknown method {name!r}{hint} Known: {', '.join(known)}") from None


def parse_entries(text: str, variable: str = "METHOD_LIST") -> list[Entry]:
    """Entries of `method:ratio[:index]`, separated by commas or white space, in their order.

    Raises ConfigError that names the variable and the entry: unknown method, ratio outside (0, 1], index that is no
    number, the same mask and ratio twice.
    """
    words = [w for w in re.split(r"[\s,]+", text.strip()) if w]
    if not words:
        raise ConfigError(f"{variable}={text!r}: expected at least one entry such as teachability:0.10:20")
    entries = [_parse_entry(word, position, variable) for position, word in enumerate(words, start=1)]
    seen: dict[tuple[str, float], Entry] = {}
    for entry in entries:
        twin = seen.setdefault((entry.mask, entry.ratio), entry)
        if twin is not entry:
            raise ConfigError(
                f"{variable}: {entry.method}:{entry.ratio:g} and {twin.method}:{twin.ratio:g} are the same run "
                f"(mask {entry.mask}); expected each mask and ratio once"
            )
    return entries


def _parse_entry(word: str, position: int, variable: str) -> Entry:
    where = f"{variable} entry {word!r}"
    parts = word.split(":")
    if len(parts) not in (2, 3):
        raise ConfigError(f"{where}: expected method:ratio:index, such as teachability:0.10:20")
    try:
        mask = resolve_method(parts[0])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    try:
        ratio = float(parts[1])
    except ValueError:
        raise ConfigError(f"{where}: expected a number as ratio, got {parts[1]!r}") from None
    if not 0 < ratio <= 1:
        raise ConfigError(f"{where}: expected a ratio in (0, 1], got {parts[1]}; ten percent is 0.10")
    index_text = parts[2] if len(parts) == 3 else str(10 * position)
    if not re.fullmatch(r"\d{1,4}", index_text):
        raise ConfigError(f"{where}: expected an index of 0 to 9999, got {index_text!r}")
    return Entry(parts[0], mask, 1.0 if mask == "full" else ratio, int(index_text))


def budget_tag(ratio: float) -> str:
    """Tag of a budget with at least two decimals: 0.05 -> r0p05, 0.1 -> r0p10, 0.005 -> r0p005, 1 -> r1p00."""
    text = f"{ratio:.10f}".rstrip("0")
    whole, _, decimals = text.partition(".")
    return f"r{whole}p{decimals.ljust(2, '0')}"


def read_budget_tag(tag: str) -> float:
    """Ratio of a tag, new (r0p05) or released (ratio005, 005, 010, 10).

    The released tag is the ratio as typed without its dot, so the dot belongs after the first digit: 005 is 0.05, 010 is
    0.10, 10 is 1.0. Raises ConfigError for anything else.
    """
    text = tag.strip()
    if found := re.fullmatch(r"r([01])p(\d+)", text):
        ratio = float(f"{found[1]}.{found[2]}")
    elif found := re.fullmatch(r"(?:ratio)?([01])(\d*)", text):
        ratio = float(f"{found[1]}.{found[2] or '0'}")
    else:
        raise ConfigError(f"budget tag: expected r0p05 (or the released form ratio005), got {tag!r}")
    if not 0 < ratio <= 1:
        raise ConfigError(f"budget tag {tag!r}: expected a ratio in (0, 1], got {ratio:g}")
    return ratio


def parse_seeds(text: str, explicit: Sequence[str | None] = (None, None, None)) -> list[Seeds]:
    """Seeds of labels such as `seed1 seed2`, or `label=train/rollout/mask`.

    seed1, seed2, ... are the released triples 1234/42/42, 1235/43/43, ... With one bare label, `explicit` values (SEED,
    ROLLOUT_SEED, OPD_BUDGET_MASK_SEED as the user set them) win. Raises ConfigError.
    """
    words = [w for w in re.split(r"[\s,]+", text.strip()) if w]
    if not words:
        raise ConfigError(f"SEEDS={text!r}: expected labels such as seed1 seed2, or label=1234/42/42")
    seeds = []
    for word in words:
        label, _, values = word.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", label):
            raise ConfigError(f"SEEDS entry {word!r}: expected letters, digits, dot, dash and underscore as label")
        if values:
            triple = values.split("/")
            if len(triple) != 3 or not all(v.isdigit() for v in triple):
                raise ConfigError(f"SEEDS entry {word!r}: expected label=train/rollout/mask, such as mine=7/8/9")
            seeds.append(Seeds(label, *map(int, triple)))
            continue
        found = re.fullmatch(r"seed([1-9]\d*)", label)
        step = int(found[1]) - 1 if found else 0
        defaults = (1234 + step, 42 + step, 42 + step)
        if len(words) == 1:
            defaults = tuple(int(e) if e else d for e, d in zip(explicit, defaults, strict=True))
        elif not found:
            raise ConfigError(f"SEEDS entry {word!r}: expected seed1, seed2, ... or label=train/rollout/mask")
        seeds.append(Seeds(label, *defaults))
    if len({s.label for s in seeds}) < len(seeds):
        raise ConfigError(f"SEEDS={text!r}: expected every label once")
    return seeds


def slug(directory: str) -> str:
    """A model directory's name for use in file names: /models/Qwen3-1.7B -> qwen3_1p7b."""
    name = directory.rstrip("/").rsplit("/", 1)[-1].lower().replace(".", "p")
    return re.sub(r"[^a-z0-9]", "_", name)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the mask of each name; the launchers call this."""
    try:
        for name in argv if argv is not None else sys.argv[1:]:
            print(resolve_method(name))
    except ConfigError as error:
        print(f"error: OPD_BUDGET_MASK: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
