"""Multi-step arithmetic and symbolic reasoning, worked out in words: a task on which entropy, divergence and compatibility all vary.

    chain     solve 17 + 35 - 8 ?                          so 17 + 35 = 52 ; then 52 - 8 = 44 ; answer 44
    modulo    mod 7 : 45 * 3 ?                             hence 45 mod 7 = 3 ; we get 3 * 3 mod 7 = 2 ; answer 2
    letters   let a = 12 , b = a + 7 , c = b - a ; find c ?     first a = 12 ; so b = 12 + 7 = 19 ; now c = 19 - 12 = 7 ; answer 7
    lists     sort 45 12 200 ?                             take 12 ; take 45 ; take 200 ; answer 12 45 200
    paths     edges bako mile , mile ruto ; from bako 2 steps ?    bako to mile ; mile to ruto ; answer ruto

One word is one token, so that a number has hundreds of rivals and a top-K list does not hold them all. The words that open a step and
that stand for `=` are the writer's habit (`Style`): two writers agree on the mathematics and disagree on words, which makes tokens of
high divergence and low compatibility beside learnable ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ta_opd.errors import ConfigError

PAD, END, UNK = "<pad>", "<end>", "<unk>"
NUMBERS = 300
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
_SOUNDS, _VOWELS = "bdfgklmnprstvz", ("ao", "ie", "uo", "ei", "oa", "iu", "ea")
NAMES = tuple(_SOUNDS[i % 14] + _VOWELS[i // 14][0] + _SOUNDS[(5 * i + 3) % 14] + _VOWELS[i // 14][1] for i in range(96))
MARKS = ("+", "-", "*", "=", ";", ",", ":", "?")
KEYWORDS = ("solve", "mod", "let", "find", "sort", "reverse", "edges", "from", "steps", "to", "take", "answer")
OPENERS = ("first", "so", "then", "next", "thus", "hence", "now", "therefore", "we", "get", "here", "next,", "clearly", "well", "okay", "hmm", "let's", "see")
EQUALS = ("=", "is", "gives", "equals", "makes", "yields")
VOCABULARY = 512


@dataclass(frozen=True)
class Level:
    """How hard: the largest number, terms of a chain, names in play. `domains` is drawn from evenly."""

    largest: int = 199
    operand: int = 50
    steps: tuple[int, int] = (3, 5)
    names: int = 60
    domains: tuple[str, ...] = ("chain", "modulo", "letters", "lists", "paths")

    def __post_init__(self):
        if not (0 < self.operand <= self.largest < NUMBERS and 1 <= self.steps[0] <= self.steps[1] <= 8 and 12 <= self.names <= len(NAMES)):
            raise ConfigError(f"level: expected 0 < operand <= largest < {NUMBERS}, 1 to 8 steps and 12 to {len(NAMES)} names, got {self}")
        unknown = set(self.domains) - set(DOMAINS)
        if unknown or not self.domains:
            raise ConfigError(f"level: expected domains of {', '.join(DOMAINS)}, got {self.domains}")


@dataclass(frozen=True)
class Style:
    """Weights of the words that a writer opens a step with, and of those for `=`; slips: share of steps with a wrong result."""

    openers: dict[str, float]
    equals: dict[str, float]
    slips: float = 0.0

    def opener(self, rng: random.Random) -> str:
        return rng.choices(list(self.openers), list(self.openers.values()))[0]

    def equal(self, rng: random.Random) -> str:
        return rng.choices(list(self.equals), list(self.equals.values()))[0]


TEACHER = Style({"so": 4, "then": 3, "thus": 2, "hence": 1, "next": 1, "now": 1}, {"=": 6, "gives": 2, "is": 1})
STUDENT = Style({"so": 4, "then": 3, "thus": 1, "okay": 2, "hmm": 1, "see": 1}, {"=": 5, "is": 3, "makes": 1}, slips=0.08)


@dataclass(frozen=True)
class Problem:
    """Words of the prompt and of a solution (without the end), and the answer's words."""

    domain: str
    prompt: tuple[str, ...]
    solution: tuple[str, ...]
    label: str


class _Writer:
    """Collects the steps of a solution in somebody's style."""

    def __init__(self, rng: random.Random, style: Style, level: Level):
        self.rng, self.style, self.level, self.words = rng, style, level, []

    def step(self, *words: str | int, result: int | None = None) -> int | None:
        """Adds a step; with `result` it ends in `= result`, which a slip may change: what was written is returned."""
        if result is not None and self.rng.random() < self.style.slips:
            result = max(0, min(self.level.largest, result + self.rng.choice((-10, -2, -1, 1, 2, 10))))
        tail = [] if result is None else [self.style.equal(self.rng), str(result)]
        self.words += [self.style.opener(self.rng), *map(str, words), *tail, ";"]
        return result

    def answer(self, *words: str | int) -> tuple[str, ...]:
        return (*self.words, "answer", *map(str, words))


def _apply(sign: str, a: int, b: int) -> int:
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def _operand(rng: random.Random, level: Level, total: int) -> tuple[str, int]:
    """A sign and a number that keep the result within the level."""
    while True:
        sign = rng.choice("++--*")
        number = rng.randint(2, 5) if sign == "*" else rng.randint(1, level.operand)
        if 0 <= _apply(sign, total, number) <= level.largest:
            return sign, number


def _chain(rng, style, level):
    total = truth = rng.randint(1, level.operand)
    prompt, write = ["solve", str(total)], _Writer(rng, style, level)
    for _ in range(rng.randint(*level.steps)):
        sign, number = _operand(rng, level, truth)
        prompt += [sign, str(number)]
        truth = _apply(sign, truth, number)
        total = write.step(total, sign, number, result=max(0, min(level.largest, _apply(sign, total, number))))
    return prompt, write.answer(total), str(truth)


def _modulo(rng, style, level):
    base = rng.randint(3, 12)
    first = rng.randint(1, level.operand)
    prompt, write, truth = ["mod", str(base), ":", str(first)], _Writer(rng, style, level), first % base
    total = write.step(first, "mod", base, result=truth)
    for _ in range(rng.randint(*level.steps) - 1):
        sign, number = rng.choice("+*"), rng.randint(1, 9)
        prompt += [sign, str(number)]
        truth = _apply(sign, truth, number) % base
        total = write.step(total, sign, number, "mod", base, result=_apply(sign, total, number) % base)
    return prompt, write.answer(total), str(truth)


def _letters(rng, style, level):
    count = rng.randint(*level.steps)
    names, write = rng.sample(LETTERS, count), _Writer(rng, style, level)
    start = rng.randint(1, level.operand)
    truth, seen = {names[0]: start}, {}
    prompt = ["let", names[0], "=", str(start)]
    seen[names[0]] = write.step(names[0], result=start)
    for previous, name in zip(names, names[1:], strict=False):
        sign, number = _operand(rng, level, truth[previous])
        truth[name] = _apply(sign, truth[previous], number)
        prompt += [",", name, "=", previous, sign, str(number)]
        result = max(0, min(level.largest, _apply(sign, seen[previous], number)))
        seen[name] = write.step(name, "=", seen[previous], sign, number, result=result)
    return [*prompt, ";", "find", names[-1]], write.answer(seen[names[-1]]), str(truth[names[-1]])


def _lists(rng, style, level):
    count, write = rng.randint(level.steps[0], level.steps[1] + 1), _Writer(rng, style, level)
    if rng.random() < 0.5:
        items = [str(x) for x in rng.sample(range(level.largest + 1), count)]
        kind, order = "sort", sorted(items, key=int)
    else:
        items = rng.sample(NAMES[: level.names], count)
        kind, order = "reverse", items[::-1]
    for item in order:
        write.step("take", item)
    return [kind, *items], write.answer(*order), " ".join(order)


def _paths(rng, style, level):
    length, write = rng.randint(*level.steps), _Writer(rng, style, level)
    places = rng.sample(NAMES[: level.names], length + 3)
    path, others = places[: length + 1], places[length + 1 :]
    edges = list(zip(path, path[1:], strict=False)) + [(others[0], others[1])]
    rng.shuffle(edges)
    prompt = ["edges"]
    for a, b in edges:
        prompt += [a, b, ","]
    for a, b in zip(path, path[1:], strict=False):
        write.step(a, "to", b)
    return [*prompt[:-1], ";", "from", path[0], str(length), "steps"], write.answer(path[-1]), path[-1]


DOMAINS: dict[str, Callable] = {"chain": _chain, "modulo": _modulo, "letters": _letters, "lists": _lists, "paths": _paths}


def make_problem(rng: random.Random, style: Style, level: Level) -> Problem:
    """A random problem of the level with a solution as this writer would put it."""
    domain = rng.choice(level.domains)
    prompt, solution, label = DOMAINS[domain](rng, style, level)
    return Problem(domain, (*prompt, "?"), tuple(solution), label)


def make_problems(count: int, seed: int, style: Style, level: Level, avoid: set[tuple[str, ...]] | None = None) -> list[Problem]:
    """`count` problems of distinct prompts, none of those in `avoid`, the same for the same seed. ConfigError where the level has too few."""
    rng, found, tries = random.Random(seed), {}, 0
    while len(found) < count:
        problem = make_problem(rng, style, level)
        tries += 1
        if problem.prompt not in (avoid or ()):
            found.setdefault(problem.prompt, problem)
        if tries > 50 * count + 1000:
            raise ConfigError(f"corpus: expected {count} distinct prompts, the level has about {len(found)}; ask for fewer or a harder level")
    return list(found.values())


def words() -> list[str]:
    """All tokens in the order of their ids, VOCABULARY of them."""
    known = [PAD, END, UNK, *(str(i) for i in range(NUMBERS)), *LETTERS, *NAMES, *MARKS, *KEYWORDS, *OPENERS, *EQUALS]
    known = list(dict.fromkeys(known))
    return known + [f"<spare_{i}>" for i in range(VOCABULARY - len(known))]


WORDS = tuple(words())
IDS = {word: i for i, word in enumerate(WORDS)}
PAD_ID, END_ID, ANSWER_ID = IDS[PAD], IDS[END], IDS["answer"]


def encode(text: Sequence[str]) -> list[int]:
    return [IDS[word] for word in text]


def answer_of(ids: Sequence[int]) -> str | None:
    """What stands between the last `answer` and the end; None where one of them is missing."""
    ids = list(ids)
    if END_ID not in ids:
        return None
    ids = ids[: ids.index(END_ID)]
    if ANSWER_ID not in ids:
        return None
    last = len(ids) - 1 - ids[::-1].index(ANSWER_ID)
    return " ".join(WORDS[i] for i in ids[last + 1 :])


def build_tokenizer():
    """A transformers tokenizer of the words, split at spaces; `save_pretrained` makes a directory that AutoTokenizer loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(dict(IDS), unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=UNK, clean_up_tokenization_spaces=False)
