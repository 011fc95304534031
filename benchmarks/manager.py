"""What the one process in the middle costs: everything that passes through the rollout manager, by stage, a response token.

    python benchmarks/manager.py            # 65,536 and 524,288 tokens, K = 16 and 64: about two minutes, 6 GB
    python benchmarks/manager.py --quick    # 8,192 tokens, K = 16: seconds

The stages of slime/ray/rollout.py, called as they are there: parsing a generation reply (JSON) and a scoring reply (packed
top-K), metrics of scored samples (so many tokens at a time as slime/rollout/measuring.py takes), selection (scores over the batch,
mask, columns of the bank queued), collecting and splitting over 8 data-parallel ranks
with the copy into shared memory, and writing the bank's file (a thread of the same process). One core, best of a few runs;
us a token in CPU time. `tools/plan_run.py` reads the result.
"""

from __future__ import annotations

import argparse
import base64
import os
import pickle
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_IO_THREADS"):
    os.environ[_variable] = "1"

import numpy as np  # noqa: E402
import orjson  # noqa: E402

if __package__ in (None, ""):
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "slime_ta_opd")]

from benchmarks.selection import RESPONSE, as_lists, best_of, machine, synthetic_batch  # noqa: E402
from slime.backends.sglang_utils import wire  # noqa: E402
from slime.backends.sglang_utils.topk_rows import FIELD, pack_rows  # noqa: E402
from slime.rollout import tip_compat  # noqa: E402
from slime.utils import fields  # noqa: E402
from slime.utils.dp_schedule import split_for_data_parallel  # noqa: E402
from slime.utils.types import Sample  # noqa: E402
from ta_opd.topk import TopK  # noqa: E402

PROMPT = 256
RANKS = 8


def generate_reply(batch: dict, rows: slice) -> bytes:
    """What the student's server answers: sampled log-probs in JSON, the top-K as one row of text a token."""
    side = batch["student"][rows]
    entries = as_lists(TopK(side.ids[:, :1], side.logprobs[:, :1]))
    ids = [row[0][1] for row in entries]
    meta = {"finish_reason": {"type": "length"}, "weight_version": "1", "output_token_logprobs": [row[0] for row in entries],
            "output_top_logprobs": [None] * side.T, FIELD: pack_rows(side.ids, side.logprobs)}  # fmt: skip
    return orjson.dumps({"text": "", "output_ids": ids, "meta_info": meta})


def score_reply(batch: dict, rows: slice) -> bytes:
    """What the teacher's server answers: sampled log-probs in JSON, the top-K packed."""
    side = batch["teacher"][rows]
    sampled = [[float(side.logprobs[i, 0]), int(side.ids[i, 0]), None] for i in range(side.T)]
    meta = {"finish_reason": {"type": "length"}, "weight_version": "1", "input_token_logprobs": sampled,
            "input_top_logprobs_shape": [side.T, side.K],
            "input_top_logprobs_val_flat_b64": base64.b64encode(side.logprobs.astype(np.float32).tobytes()).decode(),
            "input_top_logprobs_idx_flat_b64": base64.b64encode(side.ids.tobytes()).decode()}  # fmt: skip
    return orjson.dumps({"text": "", "meta_info": meta})


def make_samples(batch: dict, count: int) -> list[Sample]:
    prompt = list(range(PROMPT))
    samples = []
    for i in range(count):
        rows = slice(i * RESPONSE, (i + 1) * RESPONSE)
        ids = batch["sampled_ids"][rows].tolist()
        student, teacher = (TopK(batch[n].ids[rows], batch[n].logprobs[rows]) for n in ("student", "teacher"))
        samples.append(Sample(group_index=i, index=i, tokens=prompt + ids, response_length=RESPONSE, student_topk=student, teacher_topk=teacher,
                              rollout_log_probs=batch["student_logprobs"][rows], teacher_log_probs=batch["teacher_logprobs"][rows],
                              status=Sample.Status.TRUNCATED, rollout_id=0))  # fmt: skip
    return samples


def ship(samples: list[Sample]) -> int:
    """Collect, split, and one copy of every array, as putting the shards into Ray's shared memory makes; returns the bytes."""
    data = fields.collect(samples, fields.for_rows({"teacher_ids_RK", "teacher_logps_RK"}))
    size = 0
    for shard in split_for_data_parallel(data, RANKS, len(samples)):
        buffers: list = []
        size += len(pickle.dumps(shard, protocol=5, buffer_callback=buffers.append))
        size += sum(len(bytes(b.raw())) for b in buffers)
    return size


def measured(options, samples: list[Sample], together: int) -> None:
    """Metrics of all samples, so many at a time; anew where they have some."""
    for start in range(0, len(samples), together):
        tip_compat.measure_samples(options, samples[start : start + together])


def measure(tokens: int, k: int, runs: int) -> dict:
    """One line of the table: us of CPU a response token by stage, and bytes a token."""
    count = tokens // RESPONSE
    batch = synthetic_batch(tokens, k)
    few = min(count, 16)  # responses measured together, too
    slices = [slice(i * RESPONSE, (i + 1) * RESPONSE) for i in range(few)]
    generated, scored = [generate_reply(batch, s) for s in slices], [score_reply(batch, s) for s in slices]
    samples = make_samples(batch, count)
    options = SimpleNamespace(opd_topk_metrics_k=k, opd_budget_mask="dlearn_high", opd_budget_ratio=0.1, opd_token_bank_dir=None)
    part = few * RESPONSE
    out = {"tokens": tokens, "K": k, "generate_bytes": sum(map(len, generated)) / part, "score_bytes": sum(map(len, scored)) / part}
    stages = {
        "parse_generate": (lambda: [wire.parse_generate(r, k) for r in generated], part),
        "parse_score": (lambda: [wire.parse_score(r, RESPONSE, k) for r in scored], part),
        "measure": (lambda: measured(options, samples, few), tokens),
    }
    for name, (work, divisor) in stages.items():
        out[name] = best_of(runs, work)[0] / divisor * 1e6
    selections = []
    for _ in range(runs):
        measured(options, samples, few)
        selections.append(best_of(1, lambda: tip_compat.select_for_samples(options, samples, 0))[0])
    out["select"] = min(selections) / tokens * 1e6
    out["ship_bytes"] = ship(samples) / tokens
    out["ship"] = best_of(runs, lambda: ship(samples))[0] / tokens * 1e6
    with tempfile.TemporaryDirectory() as directory:
        options.opd_token_bank_dir = directory

        def bank():
            measured(options, samples, few)
            tip_compat.select_for_samples(options, samples, 0)
            tip_compat.flush_token_banks()

        cpu, wall = best_of(2, bank)
        tip_compat.close_token_banks()
        both = out["measure"] + out["select"]
        out["bank"], out["bank_wall"] = cpu / tokens * 1e6 - both, wall / tokens * 1e6 - both
        out["bank_bytes"] = next(Path(directory).glob("rollout_*")).stat().st_size / tokens
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[65_536, 524_288], help=f"multiples of {RESPONSE} x {RANKS}")
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="8,192 tokens, K = 16")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "manager.json")
    args = parser.parse_args(argv)
    if args.quick:
        args.tokens, args.k = [8192], [16]
    if any(t % (RESPONSE * RANKS) or t <= 0 for t in args.tokens):
        parser.error(f"--tokens: expected multiples of {RESPONSE * RANKS}, got {args.tokens}")
    rows = []
    for k in args.k:
        for tokens in args.tokens:
            rows.append(measure(tokens, k, args.runs))
            print("  ".join(f"{key} {value:,.2f}" if isinstance(value, float) else f"{key} {value:,}" for key, value in rows[-1].items()), flush=True)
    result = {"command": "python benchmarks/manager.py", "unit": "us of CPU a response token, bytes a response token", "rows": rows, "machine": machine()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json_text(result))
    print(f"written to {args.output}")
    return 0


def json_text(result: dict) -> str:
    return orjson.dumps(result, option=orjson.OPT_INDENT_2).decode() + "\n"


if __name__ == "__main__":
    sys.exit(main())
