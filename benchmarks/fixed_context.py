"""Scoring a context bank with two models: seconds by stage, beside a per-token loop on a sample of the same rows.

    python benchmarks/fixed_context.py --device cuda   # one H200: Qwen3-1.7B student, 4B teacher, 300 contexts x 192 tokens, K = 8, 16, 32
    python benchmarks/fixed_context.py --quick         # tiny, on any machine

Random weights in the models' shapes, made here and saved under --work-dir; random contexts of 64 to 192 prompt tokens. Scoring is what
tools/eval_fixed_context_bank.py runs, from model files to the finished table: `load` is reading the weights, the rest is the work.
Ways: both models resident, and one at a time (student's hidden states on disk). The loop is what scoring costs without vectorising: the
rows' logits as float32 on the CPU, one softmax, one top-K and one dictionary per token and K; its seconds for all rows are extrapolated
from the sample. The benchmark also measures the bootstrap of 1,000 draws over as many rows. It fails when scoring in float32 and the loop
disagree by 1e-4; what the models' own dtype changes is printed beside it.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

if __package__ in (None, ""):
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "slime_ta_opd")]

from benchmarks import measure as m
from ta_opd.fixed_context.bank import build_bank, context_row, load_contexts, write_bank
from ta_opd.fixed_context.bootstrap import difference_interval
from ta_opd.fixed_context.hf import CausalModel, import_transformers, resolve_dtype, weight_bytes
from ta_opd.fixed_context.scoring import ScoringConfig, score_contexts

SHAPES = {
    "student": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "teacher": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}
TINY = {
    "student": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
    "teacher": {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4},
}
TARGET_SECONDS = 15.0
TOLERANCE = 1e-4  # both in float32


def make_model(path: Path, shape: dict, vocab: int, tiny: bool, seed: int) -> Path:
    """Random weights in `shape`, saved in the dtype that scoring will use."""
    transformers = import_transformers()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.Qwen3Config(
        vocab_size=vocab, num_key_value_heads=2 if tiny else 8, head_dim=32 if tiny else 128, tie_word_embeddings=True,
        max_position_embeddings=4096, initializer_range=0.06, **shape,
    )  # fmt: skip
    torch.manual_seed(seed)
    with m.device():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=resolve_dtype("auto", m.device()))
    model.save_pretrained(path)
    return path


def make_bank(path: Path, contexts: int, length: int, vocab: int) -> Path:
    rng = random.Random(0)
    rows = []
    for i in range(contexts):
        prompt = rng.randint(64, 192) if length > 64 else rng.randint(4, 12)
        tokens = [rng.randrange(vocab) for _ in range(prompt + length)]
        rollout = {"tokens": tokens, "response_length": length, "sample_index": i, "group_index": i}
        rows.append(context_row(rollout, source="random", ordinal=i))
    return write_bank(path, build_bank(rows, max_samples=None), {"source": "random"})


def memory_plan(paths: list[Path], contexts, vocab: int, config: ScoringConfig) -> dict[str, float]:
    """GiB that scoring holds at once, from the saved weights: both models, one block of logits with what is computed from it, and (one model
    at a time) the teacher with the student's output matrix, and the student's hidden states of one part, which lie on disk."""
    import json

    dtype = resolve_dtype("auto", m.device())
    bytes_of = [weight_bytes(path, dtype) for path in paths]
    hidden = json.loads((paths[0] / "config.json").read_text())["hidden_size"] * torch.empty((), dtype=dtype).element_size()
    rows = int(contexts.scored_len.max()) * min(config.contexts_per_part, len(contexts))
    plan = {"student": bytes_of[0], "teacher": bytes_of[1], "block of logits": config.workspace_gib * m.GIB, "student's output matrix": vocab * hidden,
            "hidden states of one part (disk)": rows * hidden}  # fmt: skip
    plan["both at once"] = bytes_of[0] + bytes_of[1] + plan["block of logits"]
    plan["one at a time"] = bytes_of[1] + plan["student's output matrix"] + plan["block of logits"]
    return {name: size / m.GIB for name, size in plan.items()}


def per_token_loop(student_RV, teacher_RV, targets, ks) -> list[dict]:
    """Full-vocabulary and top-K quantities of each row with Python floats and dictionaries."""
    rows = []
    for zs, zt, target in zip(student_RV, teacher_RV, targets, strict=True):
        ls, lt = torch.log_softmax(zs, 0), torch.log_softmax(zt, 0)
        ps, pt = ls.exp(), lt.exp()
        row = {
            "Hs_full": float(-(ps * ls).sum()), "Ht_full": float(-(pt * lt).sum()), "KLf_full": float((pt * (lt - ls)).sum()),
            "KLr_full": float((ps * (ls - lt)).sum()), "student_logp_sampled": float(ls[target]),
            "target_student_rank_full": int((ls > ls[target]).sum()) + 1,
        }  # fmt: skip
        for K in ks:
            top_s, top_t = ({int(i): float(p) for p, i in zip(*side.topk(K), strict=True)} for side in (ps, pt))
            union = list(dict.fromkeys([*top_s, *top_t]))
            qs, qt = ([float(side[i]) for i in union] for side in (ps, pt))
            mass_s, mass_t = sum(qs), sum(qt)
            row[f"Cmass_true_k{K}"] = sum(float(pt[i]) for i in top_s)
            row[f"Coverlap_k{K}"] = len(set(top_s) & set(top_t)) / K
            row[f"KLf_union_k{K}"] = sum(b / mass_t * (math.log(b / mass_t) - math.log(a / mass_s)) for a, b in zip(qs, qt, strict=True))
            row[f"CBC_k{K}"] = sum(math.sqrt(a * b / mass_s / mass_t) for a, b in zip(qs, qt, strict=True))
        rows.append(row)
    return rows


def loop_on_a_sample(work: Path, paths, table, ks, length: int, vocab: int, sample: int) -> dict:
    """Seconds a row of the loop; its differences to scoring in float32 (relative above 1) and to `table`, which is scored in the models' dtype."""
    contexts = load_contexts(make_bank(work / "sample.parquet", max(1, sample // length), length, vocab))  # the first of the bank
    exact, _ = score_contexts(contexts, *paths, ScoringConfig(topk=ks, dtype="float32", residency="both"), work / "parts")
    logits = []
    for path in paths:
        model = CausalModel.load(path, device=m.device(), dtype=torch.float32)
        rows = []
        with torch.inference_mode():
            for tokens, prompt, scored in zip(contexts.tokens, contexts.prompt_len, contexts.scored_len, strict=True):
                ids = torch.as_tensor(tokens)[None].to(m.device())
                rows.append(model.full_logits(ids, torch.arange(int(prompt) - 1, int(prompt) - 1 + int(scored), device=m.device())).cpu())
        logits.append(torch.cat(rows)[:sample])
        model.free()
    targets = exact["token_id"].to_numpy()[: len(logits[0])]
    start = time.perf_counter()
    found = per_token_loop(*logits, targets, ks)
    seconds = time.perf_counter() - start
    return {"rows": len(found), "seconds_a_row": seconds / len(found), "differences": differences(found, exact, np.max),
            "median_differences_of_the_dtype": differences(found, table, np.median)}


def differences(found: list[dict], table, reduce) -> dict[str, float]:
    """Of each column, relative above 1; the median for ranks and overlaps, which jump where values are nearly equal."""
    out = {}
    for name in found[0]:
        expected = np.array([row[name] for row in found], dtype=float)
        gap = np.abs(expected - table[name].to_numpy()[: len(found)]) / np.maximum(1, np.abs(expected))
        out[name] = float((np.median if "rank" in name or "overlap" in name else reduce)(gap))
    return out


def bootstrap_seconds(groups: int, length: int) -> float:
    rng = np.random.default_rng(0)
    n = groups * length
    values, score, labels = rng.standard_normal(n), rng.random(n), np.repeat(np.arange(groups), length)
    start = time.perf_counter()
    difference_interval(values, score > 2 / 3, score < 1 / 3, labels, 1000, np.random.default_rng(1))
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for trying this out")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="cuda: stop where there is none; cpu: hide GPUs")
    parser.add_argument("--contexts", type=int, default=300)
    parser.add_argument("--response-tokens", type=int, default=192)
    parser.add_argument("--topk", default="8,16,32")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--sample", type=int, default=192, help="rows of the per-token loop")
    parser.add_argument("--repeats", type=int, default=2, help="runs with both models resident; the first also warms up")
    parser.add_argument("--work-dir", type=Path, help="models and parts; default: a temporary folder, removed at the end")
    parser.add_argument("--out", type=Path, help="folder of the result (default: benchmarks/results)")
    args = parser.parse_args(argv)
    if args.quick:
        args.contexts, args.response_tokens, args.vocab, args.sample = 20, 24, 2048, 24
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing has asked for a device yet
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, torch finds none")
    ks = tuple(int(k) for k in args.topk.split(","))
    work = args.work_dir or Path(tempfile.mkdtemp(prefix="fixed_context_"))
    shapes = TINY if args.quick else SHAPES
    paths = [make_model(work / side, shapes[side], args.vocab, args.quick, seed) for seed, side in enumerate(("student", "teacher"))]
    contexts = load_contexts(make_bank(work / "bank.parquet", args.contexts, args.response_tokens, args.vocab))
    m.free()
    plan = memory_plan(paths, contexts, args.vocab, ScoringConfig())
    print("GiB: " + ", ".join(f"{name} {size:.2f}" for name, size in plan.items()), flush=True)
    if m.device().type == "cuda" and 1.2 * plan["both at once"] * m.GIB > torch.cuda.mem_get_info()[0]:
        parser.error(f"expected {1.2 * plan['both at once']:.0f} GiB of free GPU memory, found {torch.cuda.mem_get_info()[0] / m.GIB:.0f}")
    rows = []
    for way, repeats in (("both", args.repeats), ("one", 1)):
        for turn in range(repeats):
            start = time.perf_counter()
            table, record = score_contexts(contexts, *paths, ScoringConfig(topk=ks, residency=way), work / "parts")
            total = time.perf_counter() - start
            shutil.rmtree(work / "parts")
            m.free()
            seconds = record["seconds"]
            after_loading = total - seconds["load"]
            rows.append({"way": way, "run": turn + 1, **seconds, "after loading": round(after_loading, 2), "positions": record["positions"]})
    loop = loop_on_a_sample(work, paths, table, ks, args.response_tokens, args.vocab, args.sample)
    extrapolated = loop["seconds_a_row"] * len(table)
    best = min(row["after loading"] for row in rows)
    boot = bootstrap_seconds(args.contexts, args.response_tokens)
    print(m.table(rows))
    print(f"\nper-token loop: {1e3 * loop['seconds_a_row']:.1f} ms a row on {loop['rows']} rows, {extrapolated:.0f} s for {len(table)} (extrapolated)")
    print(f"scoring is {extrapolated / best:.0f} times faster than the loop alone; bootstrap of 1,000 draws over {len(table)} rows: {boot:.3f} s")
    for what, name in (("largest differences to the loop, both in float32", "differences"), (f"median differences, {resolve_dtype('auto', m.device())} to float32", "median_differences_of_the_dtype")):
        print(f"{what} (relative above 1; ranks and overlaps: median):", {k: float(f"{v:.2g}") for k, v in loop[name].items()})
    agree = all(v <= TOLERANCE for v in loop["differences"].values())
    targets = {"after loading, s": (max(r["after loading"] for r in rows if r["way"] == "both"), TARGET_SECONDS), "bootstrap, s": (boot, 2.0)}
    for name, (found, wanted) in targets.items():
        print(f"{name}: {found:.2f}, target at most {wanted:g}: {'met' if found <= wanted else 'NOT MET'}" + (" (tiny shapes)" if args.quick else ""))
    result = {"shape": vars(args) | {"work_dir": None, "out": None}, "memory_gib": plan, "rows": rows, "loop": loop | {"extrapolated_s": extrapolated},
              "bootstrap_s": boot, "agree": agree}  # fmt: skip
    if not args.quick:
        print(m.write("fixed_context", result, args.out))
    if args.work_dir is None:
        shutil.rmtree(work, ignore_errors=True)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
