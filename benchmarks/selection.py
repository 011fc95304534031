"""What token selection costs: metrics + scores + selection, the same as a plain Python loop, and reply bytes to parquet bank.

    python benchmarks/selection.py            # 32,768 and 1,048,576 tokens, K = 16 and 64: some minutes, 8 GB of memory
    python benchmarks/selection.py --quick    # 8,192 tokens, K = 16: seconds
    python benchmarks/selection.py --parts replies    # one table; the other is kept as it was in the file

One core: every library is told to use one thread. "us/token" is the best of a few runs, in CPU time (what the work costs) and in wall
time (what the clock showed; larger when other programs use the machine). Peak memory counts every array alive, the inputs
included, as a multiple of the inputs.
"""

import argparse
import base64
import json
import os
import platform
import tempfile
import time
import tracemalloc
from pathlib import Path

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_IO_THREADS"):
    os.environ[_variable] = "1"

import numpy as np  # noqa: E402
import orjson  # noqa: E402
import pyarrow as pa  # noqa: E402

if __package__ in (None, ""):
    import sys

    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "slime_ta_opd")]

from benchmarks import selection_oracle as oracle  # noqa: E402
from slime.backends.sglang_utils.topk_rows import FIELD, pack_rows  # noqa: E402
from slime.backends.sglang_utils.wire import parse_generate, parse_score  # noqa: E402
from ta_opd.metrics import position_columns, token_metrics  # noqa: E402
from ta_opd.reply import read_reply  # noqa: E402
from ta_opd.selection import SelectionConfig, select_tokens  # noqa: E402
from ta_opd.token_bank import TokenBankWriter  # noqa: E402
from ta_opd.topk import TopK, TopKParts, sampled_logprobs  # noqa: E402

VOCAB = 151_936
RESPONSE = 1024
TARGETS = {"us_per_token": 2.0, "times_loop": 40.0, "reply_us_per_token": 15.0, "memory": 3.0}


def synthetic_topk(T: int, K: int, seed: int, dtype=np.float32) -> tuple[TopK, TopK]:
    """Two sides whose ids overlap by about 70 %, with log-probs spread as those of a language model."""
    rng = np.random.default_rng(seed)
    sides = []
    base_T1, step_T1 = rng.integers(0, VOCAB, (T, 1)), rng.integers(1, 900, (T, 1))
    student_places = np.tile(np.arange(K), (T, 1))
    teacher_places = np.where(rng.random((T, K)) < 0.7, np.roll(student_places, 1, axis=1), student_places + K)
    for places_TK in (student_places, teacher_places):
        logprobs_TK = -np.cumsum(rng.exponential(0.6, (T, K)).astype(dtype), axis=1)
        logprobs_TK -= np.log(np.exp(logprobs_TK).sum(axis=1, keepdims=True) / rng.uniform(0.85, 0.999, (T, 1)).astype(dtype))
        sides.append(TopK(((base_T1 + step_T1 * places_TK) % VOCAB).astype(np.int32), logprobs_TK.astype(dtype)))
    return sides[0], sides[1]


def synthetic_batch(T: int, K: int, dtype=np.float32) -> dict:
    block = min(T, 32_768)
    parts = [synthetic_topk(min(block, T - start), K, start, dtype) for start in range(0, T, block)]
    student, teacher = (TopK.concat([part[side] for part in parts]) for side in (0, 1))
    return {
        "student": student, "teacher": teacher, "sampled_ids": student.ids[:, 0].copy(),
        "student_logprobs": student.logprobs[:, 0].copy(), "teacher_logprobs": teacher.logprobs[:, 0].copy(),
        "response_lengths": np.full(T // RESPONSE, RESPONSE),
    }  # fmt: skip


def best_of(runs: int, work) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of the best of some runs."""
    seconds = []
    for _ in range(runs):
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(s[0] for s in seconds), min(s[1] for s in seconds)


def select_from(batch: dict, config: SelectionConfig, support: str):
    metrics = token_metrics(**batch, support=support)
    valid = np.ones(batch["sampled_ids"].size, bool)
    return select_tokens(metrics, valid, batch["response_lengths"], config)


def peak_memory(T: int, K: int, dtype, config, support) -> float:
    """Peak of all arrays alive over the size of the input arrays."""
    tracemalloc.start()
    batch = synthetic_batch(T, K, dtype)
    inputs = sum(part.nbytes for name in ("student", "teacher") for part in (batch[name].ids, batch[name].logprobs))
    inputs += sum(values.nbytes for name, values in batch.items() if name not in ("student", "teacher"))
    tracemalloc.reset_peak()
    select_from(batch, config, support)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / inputs


def as_lists(topk: TopK) -> list:
    pairs = zip(topk.logprobs.astype(np.float64).tolist(), topk.ids.tolist(), strict=True)
    return [[[logprob, token, None] for logprob, token in zip(*row, strict=True)] for row in pairs]


def loop_seconds_per_token(batch: dict, K: int, tokens: int, support: str) -> float:
    """CPU seconds a token of the plain Python loop (metrics, scores, selection) on the first tokens of the batch."""
    student, teacher = (as_lists(batch[name][:tokens]) for name in ("student", "teacher"))
    sampled = batch["sampled_ids"][:tokens].tolist()

    def loop():
        table = oracle.rows([(student, teacher, sampled)], K, support)
        oracle.score(table, [True] * tokens)
        oracle.select(table, [True] * tokens, "Dlearn", 0.1)

    return best_of(2, loop)[0] / tokens


def raw_replies(batch: dict, count: int, packed: bool) -> list[tuple[bytes, bytes]]:
    """(student reply, teacher reply) bytes of the first `count` responses. packed: top-K as rows of text and as base64 arrays."""
    replies = []
    for index in range(count):
        rows = slice(index * RESPONSE, (index + 1) * RESPONSE)
        infos = []
        for side, prefix in (("student", "output"), ("teacher", "input")):
            entries = as_lists(batch[side][rows])
            sampled = [[row[0][0], row[0][1], None] for row in entries]
            lead = [None] if side == "teacher" else []
            infos.append({f"{prefix}_token_logprobs": lead + sampled, f"{prefix}_top_logprobs": lead + entries})
        if packed:
            sampled = batch["student"][rows]
            infos[0] |= {"output_top_logprobs": [None] * RESPONSE, FIELD: pack_rows(sampled.ids, sampled.logprobs)}
            topk = batch["teacher"][rows]
            del infos[1]["input_top_logprobs"]
            infos[1] |= {
                "input_top_logprobs_shape": topk.ids.shape,
                "input_top_logprobs_val_flat_b64": base64.b64encode(topk.logprobs.tobytes()).decode(),
                "input_top_logprobs_idx_flat_b64": base64.b64encode(topk.ids.tobytes()).decode(),
            }
        ids = [{"output_ids": batch["student"][rows].ids[:, 0].tolist()}, {}]
        replies.append(tuple(orjson.dumps({"text": "", **own, "meta_info": info}) for own, info in zip(ids, infos, strict=True)))
    return replies


def replies_to_bank(replies, packed: bool, repeats: int, K: int, config: SelectionConfig, directory: str) -> None:
    """Every step from the bytes of the replies to a parquet file on disk."""
    students, teachers, sampled, logprobs = [], [], [], ([], [])
    for raw_student, raw_teacher in replies * repeats:
        if packed:
            answer = parse_generate(raw_student, K)
            students.append(answer.topk)
            logprobs[0].append(answer.log_probs)
            sampled.append(np.asarray(answer.output_ids, np.int32))
        else:
            reply, topk = read_reply(raw_student, "student", K, RESPONSE)
            entries = reply["meta_info"]["output_token_logprobs"]
            students.append(topk)
            logprobs[0].append(sampled_logprobs(entries, RESPONSE))
            sampled.append(np.fromiter((entry[1] for entry in entries), np.int32, RESPONSE))
        if packed:
            score = parse_score(raw_teacher, RESPONSE, K)
            teachers.append(score.topk)
            logprobs[1].append(score.log_probs)
        else:
            reply, topk = read_reply(raw_teacher, "teacher", K, RESPONSE)
            teachers.append(topk)
            logprobs[1].append(sampled_logprobs(reply["meta_info"]["input_token_logprobs"], RESPONSE))
    student, teacher, token_ids = TopKParts(students), TopKParts(teachers), np.concatenate(sampled)
    lengths = np.full(len(students), RESPONSE)
    metrics = token_metrics(
        student, teacher, sampled_ids=token_ids, student_logprobs=np.concatenate(logprobs[0]),
        teacher_logprobs=np.concatenate(logprobs[1]), response_lengths=lengths,
    )  # fmt: skip
    valid = np.ones(token_ids.size, bool)
    selection = select_tokens(metrics, valid, lengths, config)
    positions = position_columns(lengths)
    columns = {
        **metrics, **selection.columns, "tok_pos": positions["tok_pos"], "pos_norm": positions["pos_norm"],
        "sample_ordinal": positions["sample"], "token_id": token_ids, "loss_mask_original": valid, "rollout_id": 0,
    }  # fmt: skip
    writer = TokenBankWriter(directory, "parquet", config.resolved())
    writer.write(0, columns)
    writer.close()


def measure(T: int, K: int, mode: str, runs: int) -> dict:
    """One line of the table. mode: "paper", "paper, union_tail" or "released"."""
    released = mode == "released"
    dtype, support = np.float64 if released else np.float32, "union_tail" if "tail" in mode else "union_floor"
    config = SelectionConfig(mask="dlearn_high", ratio=0.1, profile="released" if released else "paper")
    batch = synthetic_batch(T, K, dtype)
    cpu, wall = best_of(runs, lambda: select_from(batch, config, support))
    loop = loop_seconds_per_token(batch, K, min(T, 2048), support)
    return {
        "tokens": T, "K": K, "mode": mode, "cpu_us_per_token": cpu / T * 1e6, "wall_us_per_token": wall / T * 1e6,
        "loop_us_per_token": loop * 1e6, "times_loop": loop * T / cpu,
        "memory": peak_memory(T, K, dtype, config, support),
    }  # fmt: skip


def measure_replies(T: int, K: int, packed: bool, runs: int) -> dict:
    """One line of the second table. packed: both top-K as our servers answer them; else triples, as a stock slime gets them."""
    distinct = min(T // RESPONSE, 32)
    replies = raw_replies(synthetic_batch(distinct * RESPONSE, K), distinct, packed)
    config = SelectionConfig(mask="dlearn_high", ratio=0.1)
    with tempfile.TemporaryDirectory() as directory:
        cpu, wall = best_of(runs, lambda: replies_to_bank(replies, packed, T // RESPONSE // distinct, K, config, directory))
    size = sum(len(raw) for pair in replies for raw in pair) / (distinct * RESPONSE)
    return {"tokens": T, "K": K, "top_k": "packed" if packed else "triples", "bytes_per_token": size,
            "cpu_us_per_token": cpu / T * 1e6, "wall_us_per_token": wall / T * 1e6}  # fmt: skip


def machine() -> dict:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), model)
    load = os.getloadavg()[0]
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__,
            "pyarrow": pa.__version__, "load_at_end": round(load, 1)}  # fmt: skip


def print_tables(result: dict) -> None:
    print(f"\nmetrics + scores + selection, one core, {result['machine']['cpu']}")
    print(f"{'tokens':>9} {'K':>3} {'mode':<18} {'us/token cpu':>12} {'wall':>6} {'loop us':>8} {'x loop':>7} {'memory x':>8}")
    for row in result.get("selection", ()):
        print(
            f"{row['tokens']:>9,} {row['K']:>3} {row['mode']:<18} {row['cpu_us_per_token']:>12.2f} {row['wall_us_per_token']:>6.2f} "
            f"{row['loop_us_per_token']:>8.0f} {row['times_loop']:>7.0f} {row['memory']:>8.2f}"
        )
    print("\nreply bytes to finished parquet bank")
    print(f"{'tokens':>9} {'K':>3} {'top-K':<8} {'bytes/token':>11} {'us/token cpu':>12} {'wall':>6}")
    for row in result.get("replies", ()):
        print(
            f"{row['tokens']:>9,} {row['K']:>3} {row['top_k']:<8} {row['bytes_per_token']:>11.0f} {row['cpu_us_per_token']:>12.2f} "
            f"{row['wall_us_per_token']:>6.2f}"
        )
    print(f"\ntargets: {TARGETS}; the load average of the machine was {result['machine']['load_at_end']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768, 1_048_576], help=f"multiples of {RESPONSE}")
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--modes", nargs="+", default=["paper", "paper, union_tail", "released"])
    parser.add_argument("--parts", nargs="+", choices=["selection", "replies"], default=["selection", "replies"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="8,192 tokens, K = 16")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "selection.json")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.k = [8192], [16]
    if any(T % RESPONSE or T < RESPONSE for T in args.tokens):
        parser.error(f"--tokens: expected multiples of {RESPONSE}, got {args.tokens}")
    result = {part: [] for part in args.parts}
    if len(args.parts) == 1 and args.output.exists():
        result = {**json.loads(args.output.read_text()), **result}
    for T in args.tokens:
        runs = max(2, args.runs if T < 1 << 19 else args.runs // 2)
        for K in args.k:
            # The float64 parity dtype is for comparisons with released runs: small batches are enough to price it.
            for mode in (m for m in args.modes if "selection" in args.parts and (m != "released" or T < 1 << 19)):
                result["selection"].append(measure(T, K, mode, runs))
            if "replies" in args.parts:
                result["replies"] += [measure_replies(T, K, packed, 2) for packed in (False, True)]
    result["machine"] = machine()
    print_tables(result)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
