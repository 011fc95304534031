"""The quick start's task: chains of additions and subtractions, worked out in steps, one character a token.

    prompt    Q7+5-3+8+2?
    response  7+5=12;12-3=9;9+8=17;17+2=19;A19

The first number and every operand are 1 to 9 and no intermediate result is negative. The task is small enough for a
model of some hundred thousand parameters and still has what token selection needs: easy tokens (copying), hard tokens
(the digits of a result), and errors that carry over to the rest of the response.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from ta_opd.errors import ConfigError, DataError

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789+-=;?QA"
VOCAB_SIZE = 32
DEFAULT_OPERATIONS = 4


@dataclass(frozen=True)
class Problem:
    """One chain: `prompt` and the `solution` a perfect model writes after it; `label` is the final number as text."""

    prompt: str
    solution: str
    label: str


def solve(numbers: list[int], signs: str) -> Problem:
    """The problem `numbers[0] signs[0] numbers[1] ...` with its worked solution.

    `signs` holds one '+' or '-' for each number after the first. Raises DataError when the lengths do not fit or a
    result would be negative.
    """
    if len(signs) != len(numbers) - 1:
        raise DataError(f"expected one sign fewer than numbers, got {len(numbers)} numbers and {len(signs)} signs")
    total, steps, question = numbers[0], [], str(numbers[0])
    for sign, number in zip(signs, numbers[1:], strict=True):
        result = total + number if sign == "+" else total - number
        if result < 0:
            raise DataError(f"expected no negative result, got {total}{sign}{number}={result}")
        steps.append(f"{total}{sign}{number}={result};")
        question += f"{sign}{number}"
        total = result
    return Problem(f"Q{question}?", "".join(steps) + f"A{total}", str(total))


def sample_problem(rng: random.Random, operations: int = DEFAULT_OPERATIONS) -> Problem:
    """A random problem of `operations` steps; a subtraction that would go below zero is drawn as an addition."""
    total = rng.randint(1, 9)
    numbers, signs = [total], ""
    for _ in range(operations):
        number = rng.randint(1, 9)
        sign = "+" if rng.random() < 0.5 or number > total else "-"
        total = total + number if sign == "+" else total - number
        numbers.append(number)
        signs += sign
    return solve(numbers, signs)


def make_problems(
    num_train: int, num_heldout: int, *, seed: int, operations: int = DEFAULT_OPERATIONS
) -> tuple[list[Problem], list[Problem]]:
    """`num_train` and `num_heldout` distinct problems, disjoint by prompt, the same for the same seed.

    Raises ConfigError when the task has too few distinct problems to draw from (fewer than twice as many as asked).
    """
    if min(num_train, num_heldout, operations) < 1:
        raise ConfigError(
            f"expected at least one training problem, one held-out problem and one operation, "
            f"got {num_train}, {num_heldout}, {operations}"
        )
    wanted = num_train + num_heldout
    if 9 ** (operations + 1) < 2 * wanted:
        raise ConfigError(
            f"expected room for {wanted} distinct problems, got chains of {operations} operation(s) with about "
            f"{9 ** (operations + 1)}: ask for fewer problems or more operations"
        )
    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    while len(problems) < wanted:
        problem = sample_problem(rng, operations)
        problems.setdefault(problem.prompt, problem)
    drawn = list(problems.values())
    return drawn[num_heldout:], drawn[:num_heldout]


def extract_answer(response: str) -> str | None:
    """The final number of a response (what follows the last `A`), or None where there is none."""
    match = re.search(r"A(\d+)(?:<eos>)?\s*$", response)
    return match.group(1) if match else None


def is_correct(response: str, label: str) -> bool:
    """Whether the response ends in the right answer."""
    return extract_answer(response) == str(label)


def write_jsonl(problems: list[Problem], path: Path) -> None:
    """One line a problem with the keys `prompt` and `label`, as a DAPO-Math prompt file has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as handle:
        for problem in problems:
            handle.write(json.dumps({"prompt": problem.prompt, "label": problem.label}) + "\n")


def read_jsonl(path: Path) -> list[Problem]:
    """The problems of a file made by `write_jsonl`, their solutions worked out again.

    Raises DataError, with the line number, for a line that is not one of this task's problems.
    """
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            problem = parse_prompt(row["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError, DataError) as error:
            raise DataError(f"{path}, line {number}: expected a problem with `prompt` and `label`, got {line!r}: {error}") from error
        if problem.label != str(row.get("label")):
            raise DataError(f"{path}, line {number}: expected label {problem.label!r}, got {row.get('label')!r}")
        problems.append(problem)
    if not problems:
        raise DataError(f"{path}: expected at least one problem, got an empty file")
    return problems


def parse_prompt(prompt: str) -> Problem:
    """The problem that a prompt such as `Q7+5-3?` asks. Raises DataError for anything else."""
    if not isinstance(prompt, str) or not re.fullmatch(r"Q\d+(?:[+-]\d+)+\?", prompt):
        raise DataError(f"expected a prompt such as 'Q7+5-3?', got {prompt!r}")
    numbers = [int(part) for part in re.findall(r"\d+", prompt)]
    return solve(numbers, "".join(re.findall(r"[+-]", prompt)))


def build_tokenizer():
    """The task's tokenizer: one id a character, `<pad>` 0, `<eos>` 1, `<unk>` 2, spare ids up to 32.

    Returns a transformers PreTrainedTokenizerFast; `save_pretrained` makes a directory that AutoTokenizer loads.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [PAD, EOS, UNK, *CHARACTERS]
    pieces += [f"<spare_{index}>" for index in range(VOCAB_SIZE - len(pieces))]
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def write_task(
    directory: Path, *, num_train: int = 2000, num_heldout: int = 300, operations: int = DEFAULT_OPERATIONS, seed: int = 1
) -> dict[str, Path]:
    """Write `train.jsonl`, `heldout.jsonl` and `tokenizer/` into `directory`; returns their paths by name."""
    train, heldout = make_problems(num_train, num_heldout, seed=seed, operations=operations)
    paths = {"train": directory / "train.jsonl", "heldout": directory / "heldout.jsonl", "tokenizer": directory / "tokenizer"}
    write_jsonl(train, paths["train"])
    write_jsonl(heldout, paths["heldout"])
    build_tokenizer().save_pretrained(str(paths["tokenizer"]))
    return paths
