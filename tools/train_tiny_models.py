"""Train (or fetch from the cache) the quick start's teacher and student and print where they are."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from examples.quickstart import arithmetic, tiny_models
from ta_opd.errors import TaOpdError

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    defaults = tiny_models.Settings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heldout", type=Path, help="JSONL of problems that are never trained on; default: those of the quick start")
    parser.add_argument("--cache-dir", type=Path, default=ROOT / "outputs" / "cache")
    parser.add_argument("--teacher-steps", type=int, default=defaults.teacher.steps)
    parser.add_argument("--teacher-seed", type=int, default=defaults.teacher.seed)
    parser.add_argument("--student-seed", type=int, default=defaults.student.seed)
    parser.add_argument("--student-stop-at", type=float, default=defaults.student.stop_at, help="share of validation problems solved")
    parser.add_argument("--force", action="store_true", help="train again although the models are cached")
    args = parser.parse_args(argv)
    settings = dataclasses.replace(
        defaults,
        teacher=dataclasses.replace(defaults.teacher, seed=args.teacher_seed, steps=args.teacher_steps, schedule=args.teacher_steps),
        student=dataclasses.replace(defaults.student, seed=args.student_seed, stop_at=args.student_stop_at),
    )
    try:
        heldout = arithmetic.read_jsonl(args.heldout) if args.heldout else arithmetic.make_problems(2000, 300, seed=1)[1]
        models = tiny_models.tiny_models(args.cache_dir, heldout, settings, force=args.force)
    except (TaOpdError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    how = "cached" if models.cached else "trained"
    print(f"teacher ({how}, solves {models.teacher_accuracy:.1%}): {models.teacher}")
    print(f"student ({how}, solves {models.student_accuracy:.1%}): {models.student}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
