"""Writes docs/scaling.md: plans of tools/plan_run.py from one GPU to 1,024, and what stops growing first at each size.

  make_scaling_page.py            writes the page
  make_scaling_page.py --check    ends with 1 when the page is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from slime.planning.layout import Layout, Servers, Split
from slime.planning.limits import CROWDED, limits
from slime.planning.models import load_model
from slime.planning.predict import Machine, Prediction, Task, predict
from slime.planning.rates import STATUSES, load_rates
from slime.planning.render import ROW_HEAD, markdown_limits, markdown_row
from slime.planning.search import best_plan
from slime.planning.workload import Workload
from ta_opd.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"
RATES = RESULTS / "rates.json"
# Whole steps of 64 x 4 x 1,024 by topology of benchmarks/gpu/opd_step.py; those that are there are compared with.
RECORDED = {topology: RESULTS / f"opd_step_{topology}_h200_64x4x1024_r0p10.json" for topology in ("one", "apart", "tp2")}
PLACES = {"one": "One H200, everything colocated", "apart": "Two H200s, both servers on one and the trainer on the other",
          "tp2": "Two H200s, the trainer TP2 on both and both servers on each"}
SPLITS = {"one": Split("colocated", Layout(), Servers(1, 1), Servers(1, 1)), "apart": Split("servers apart", Layout(), Servers(1, 1), Servers(1, 1)),
          "tp2": Split("colocated", Layout(tp=2), Servers(2, 1), Servers(2, 1))}  # fmt: skip
SPREAD_MEAN = 398.8  # of own_length() of benchmarks/own_lengths.py over 64 responses
# title, student, teacher, workload, GPUs
SCENES = (
    ("One node, short answers", "1.7B", "4B", {"prompts": 64, "samples": 4, "response_len": 1024, "response_mean": 700}, (1, 2, 4, 8)),
    ("One to four nodes", "4B", "14B", {"prompts": 128, "samples": 4, "response_len": 4096, "response_mean": 2000}, (4, 8, 16, 32)),
    ("Long reasoning", "8B", "32B", {"prompts": 256, "samples": 4, "response_len": 16384, "response_mean": 6000}, (16, 32, 64, 128)),
    ("A teacher of 235B-A22B, 32k tokens", "8B", "235B-A22B", {"prompts": 256, "samples": 4, "response_len": 32768, "response_mean": 12000}, (32, 64, 128, 256)),
    ("The same, a larger student", "32B", "235B-A22B", {"prompts": 512, "samples": 4, "response_len": 32768, "response_mean": 12000}, (128, 256, 512, 1024)),
    ("Small models, very large batches", "1.7B", "4B", {"prompts": 8192, "samples": 4, "response_len": 4096, "response_mean": 2000}, (64, 256, 1024)),
)  # fmt: skip
INTRO = """# Scaling: from one GPU to 1,024, on paper that is checked

<!-- written by tools/make_scaling_page.py; edit that -->

`tools/plan_run.py` predicts the seconds and the memory of every phase and searches for the best use of a number of GPUs:

```
PYTHONPATH=.:slime_ta_opd python tools/plan_run.py --student 1.7B --teacher 4B --gpus 8 --response-mean 700
PYTHONPATH=.:slime_ta_opd python tools/plan_run.py --student HF_DIR --teacher HF_DIR --gpu H100 --gpus 16 --json
```

It prints the plan as flags of `train.py`, and with `--sources` says of every rate whether it was **measured** (by a benchmark of that piece alone),
**calibrated** (taken from the whole steps it is compared with) or **assumed** (a data sheet or a guess). The rates are in
`benchmarks/results/rates.json`, made from the raw results by `benchmarks/fit_rates.py`. Everything here is for H200s in nodes of eight,
K = 16, a budget of 10 % spread evenly over the responses, prompts of 256 tokens, and the token bank on.

Whole steps have been run as far as the next section shows. All other tables are predictions, and what they assume about links between
nodes, tensor parallelism beyond two cards, experts and memory reserves has not been measured here.

## Against what was measured

"""
MECHANICS = """
## How the parts are predicted

- **Generate**: a decoding step is as long as the longer of two: the scheduler's Python (a fixed time, one for each running request, more with
  top-K) and the GPU (weights and the cache of every running response over the bandwidth, a fixed time a layer, sampling of each request).
  With all responses equally long the step count is waves x length; with spread lengths a tail of the longest remains.
- **Score**: prefill operations at the measured share of the matrix rate, and after it the host's work on each token, more with top-K. What ends
  early is scored while others are still sampled; on shared GPUs that time is added to generation, whose short gaps were seen not to hide it.
- **Train**: operations (6 N a token, attention, kept rows through the vocabulary matrix, recompute up to each MLP's last product) at the measured share of the
  matrix rate,
  a fixed time a micro-batch, at least what the host takes to start its layers' kernels, then messages of TP, CP and EP, the pipeline's bubble, gradients and the optimizer.
- **The manager** (parse, measure, select, split, bank): times a token of one core from `benchmarks/manager.py`, times what the GPU host's manager
  took longer than that machine's (`manager_factor`: another core, and client threads beside it).
- **Memory**: 18 bytes a trainer parameter, the 12 of the optimizer divided over data- and context-parallel ranks; inputs of all layers and one
  layer's working set as measured; server weights, 4 GiB of reserve each, caches.

More GPUs never make a plan slower: sizes are tried from one fixed grid, and a plan may leave GPUs unused.
"""


def compared(rates, topology: str) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by phase and in total of a recorded step: (measured, predicted)."""
    split, seconds = SPLITS[topology], json.loads(RECORDED[topology].read_text())["seconds"]
    task = Task(load_model("1.7B"), load_model("4B"), Workload(max_tokens=16384), Machine(rates.gpu("H200"), split.gpus), rates)
    got = predict(task, split)
    return {p: seconds["sample" if p == "generate" else p] for p in (*got.seconds, "total")}, {**got.seconds, "total": got.total}


def measured_table(rates) -> list[str]:
    """The recorded steps beside their predictions."""
    whole_steps = rates.rates["reply_seconds"].status == "measured"  # services.py sampled more than 64 at once
    basis = {"generate": "measured" if whole_steps else "measured, with 64 at once", "score": "measured", "select": "the GPU host's CPU calibrated; metrics were in it",
             "split": "calibrated", "train": rates.rates["train_utilisation"].status, "sync": "copy measured, pause calibrated", "total": ""}  # fmt: skip
    lines = ["64 x 4 x 1,024, K = 16, budget 0.10, mask entropy, 256 responses at once, CUDA graphs up to 256 (`tools/plan_run.py --compare`):"]
    for topology, path in RECORDED.items():
        if not path.is_file():
            continue
        lines += ["", f"{PLACES[topology]} (`benchmarks/results/{path.name}`):", "",
                  "| phase | measured s | predicted s | difference | rests on |", "|---|---|---|---|---|"]  # fmt: skip
        real, guess = compared(rates, topology)
        lines += [f"| {p} | {real[p]:.3g} | {guess[p]:.3g} | {guess[p] / real[p] - 1:+.0%} | {basis[p]} |" for p in real]
    missing = [PLACES[t][0].lower() + PLACES[t][1:] for t, path in RECORDED.items() if not path.is_file()]
    if missing:
        lines += ["", f"Not run as a whole: {'; '.join(missing)}."]
    lines += ["", *RESTS_ON]
    if not whole_steps:
        lines += ["What sampling rests on was measured with 64 responses at once, where a step was as long as the scheduler's Python; its part for each request",
                  "is taken to be the same with 256. The GPU's part of a step is a guess that no measurement here bounds. Three full garbage collections",
                  "of the servers, about 0.7 s each (mended since), are in the measured seconds and not in the predicted."]  # fmt: skip
    return lines + others(rates)


RESTS_ON = ["Sampling, scoring and training come from benchmarks of these parts alone (`services.py`, `loss_rows.py --part step`), not from these runs; `select`,",
            "`split` and the pause of a sync are the one-GPU step's own numbers and show nothing there."]  # fmt: skip


def others(rates) -> list[str]:
    """Measurements of sampling and scoring to which no rate is fitted, beside their predictions."""
    rows = json.loads((RESULTS / "services_h200.json").read_text())
    rollouts = [r for r in rows if r["part"] == "overlap" and "generation_alone" in r]
    small, one = (json.loads(path.read_text()) for path in (RESULTS / "opd_step_one_h200_4x2x64_r0p10.json", RECORDED["one"]))
    short = small["seconds"]

    def got(**work) -> Prediction:
        return predict(Task(load_model("1.7B"), load_model("4B"), Workload(**work), Machine(rates.gpu("H200"), 1), rates), SPLITS["one"])

    spread = got(prompts=64, samples=1, response_len=512, response_mean=SPREAD_MEAN)
    little = got(prompts=4, samples=2, response_len=64)
    found = [
        ("64 responses of 256 to 512 tokens: sampling alone", rollouts[0]["generation_alone"], spread.generate.wall),
        *((f"the same, scored as they end, {turn} time", r["seconds"], spread.seconds["generate"] + spread.seconds["score"])
          for turn, r in zip(("first", "second"), rollouts, strict=True)),
        *((f"8 responses of 64 tokens: {phase}", short[key], little.seconds[phase])
          for phase, key in (("generate", "sample"), ("score", "score"), ("train", "train"), ("sync", "sync"))),
        ("8 responses of 64 tokens: the step", short["total"], little.total),
    ]  # fmt: skip
    return ["", "Other measurements on the same kind of GPU (`services_h200.json`, `opd_step_one_h200_4x2x64_r0p10.json`); only the short step's `train` has a rate fitted to it:", "",
            "| what | measured s | predicted s | difference |", "|---|---|---|---|",
            *(f"| {what} | {real:.3g} | {guess:.3g} | {guess / real - 1:+.0%} |" for what, real, guess in found),
            "", "What a step of 8 x 64 tokens does in the manager (3 ms each of `select` and `split`) is not predicted: it does not grow with tokens.",
            "Its training waits for the host that starts kernels (`layer_start_seconds`, which nothing else here tells). A sync of the same weights took "
            f"{short['sync']:.3f} s (median of {small['steps']}) here and {one['seconds']['sync']:.3f} s in the long step (of {one['steps']}), to which its pause is fitted."]  # fmt: skip


def scene(rates, title: str, student: str, teacher: str, work: dict, sizes) -> tuple[list[str], list[tuple[Task, Prediction]]]:
    lines = ["", f"## {title}: {teacher} teaches {student}", "",
             f"{work['prompts']} prompts x {work['samples']} responses of at most {work['response_len']:,} tokens, {work['response_mean']:,} on average.", "", ROW_HEAD]  # fmt: skip
    plans = []
    for gpus in sizes:
        task = Task(load_model(student), load_model(teacher), Workload(**work), Machine(rates.gpu("H200"), gpus), rates)
        plans.append((task, best_plan(task)))
        lines.append(markdown_row(*plans[-1]))
    lines += ["", f"What does not grow with GPUs, at {sizes[-1]:,}:", "", "| part | seconds | share | load |", "|---|---|---|---|", *markdown_limits(*plans[-1])]
    return lines, plans


def asynchronous(rates) -> list[str]:
    """The largest scene with train_async.py: how the GPUs are then split."""
    title, student, teacher, work, sizes = SCENES[4]
    lines = ["", "## With `train_async.py`", "",
             f"The rollout of step k + 1 is made while step k trains, with weights one step old; a step is then the longer of the two plus the sync. The run "
             f"above ({teacher} teaches {student}), engines and teachers on GPUs of their own:", "", ROW_HEAD]  # fmt: skip
    for gpus in sizes:
        task = Task(load_model(student), load_model(teacher), Workload(**work, asynchronous=True), Machine(rates.gpu("H200"), gpus), rates)
        try:
            lines.append(markdown_row(task, best_plan(task, ("apart",))))
        except ConfigError as error:
            lines.append(f"| {gpus} | {str(error).split('.')[0]} |" + " |" * 13)
    return lines


def breaking(rates, plans: list[tuple[Task, Prediction]]) -> list[str]:
    one = Task(load_model("1.7B"), load_model("4B"), Workload(), Machine(rates.gpu("H200"), 1), rates)
    found = {x.name: x for x in limits(one, predict(one, SPLITS["one"]))}
    parse, select = found["replies parsed and measured in one process"], found["batch-wide statistics and mask"]
    ship, bank = found["splitting and shipping"], found["token bank, one thread"]
    middle = predict(one, SPLITS["one"]).middle
    reply = middle.reply_bytes / one.work.response_tokens
    at_16, at_64 = (sum(rates[f"{n}_us_fixed"] + k * rates[f"{n}_us_per_k"] for n in ("parse", "measure")) for k in (16, 64))
    slower = at_16 / at_64
    first = []
    for task, p in plans:
        top = limits(task, p)[:2]
        words = "; ".join(f"{x.name} {x.share:.1%} ({x.seconds:.1f} s{', hidden' if x.hidden else ''})" for x in top)
        state = "over its allowance" if top[0].crowded else "within its allowance"
        first.append(f"| {task.student.name} from {task.teacher.name}, {task.work.response_tokens / 1e6:,.1f} M tokens a step | {p.split.gpus:,} | "
                     f"{task.work.response_tokens / p.total:,.0f} | {words} | {state} |")  # fmt: skip
    return f"""
## What breaks first

One process stands in the middle: the `RolloutManager` actor. Every reply of every engine and teacher is read, parsed and measured in it,
the statistics of the whole batch are computed in it, and it cuts the batch into shards. Per-token data never pass through the driver
(it holds references), and each trainer rank fetches the shard of its data-parallel share only. Allowance: {CROWDED:.0%} of the step for what
the step waits for, all of the phase it hides behind for the rest.

| run | GPUs | tokens/s | the two most crowded parts | state |
|---|---|---|---|---|
{chr(10).join(first)}

**Reply bytes, parsing and metrics.** A response token at K = 16 comes as {reply:,.0f} bytes: {rates["generate_bytes_fixed"] + 16 * rates["generate_bytes_per_k"]:,.0f} from the student in JSON,
{rates["score_bytes_fixed"] + 16 * rates["score_bytes_per_k"]:,.0f} from the teacher, whose top-K is packed. Parsing and the metrics of each token take {1e6 * middle.parse / one.work.response_tokens:.2f} us of one core of the GPU host, so one manager saturates at
{parse.breaks_at:,.0f} response tokens a second ({parse.breaks_at * reply / 1e6:,.0f} MB/s); at K = 64 at {parse.breaks_at * slower:,.0f}. What the code does: replies become float32 and int32
arrays the moment they arrive, raw bytes are dropped, large ones are parsed in threads, the score's top-K skips JSON, only the response
span is asked for, metrics are computed in a thread in blocks that stay in cache as soon as a response is scored, and all of it runs beside
generation. What it does not do: spread replies over several processes. Past that rate `generate` is as long as this work; the planner counts it so. One event loop also holds one connection a running response.

**Batch-wide statistics.** Quantiles over the batch, scores and the mask take {1e6 * middle.select / one.work.response_tokens:.2f} us a token on the GPU host, and the step waits for them: 10 % of a
step at {select.breaks_at:,.0f} tokens a second. Memory is about {middle.held_bytes / one.work.response_tokens:,.0f} bytes a token while they run. What the code does: float32, quantiles by
partition and not by sorting, and nothing here that a single response could have had before. (The recorded steps above computed the metrics here, too;
their `select` is that of both.)

**Splitting and shipping.** {middle.ship_bytes / one.work.response_tokens:,.0f} bytes a token into Ray's shared memory, {1e6 * middle.split / one.work.response_tokens:.2f} us a token, 10 % of a step at {ship.breaks_at:,.0f} tokens a second. Tensor-, pipeline-
and context-parallel ranks of one share fetch the same object.

**Token bank.** {middle.bank_bytes / one.work.response_tokens:,.0f} bytes a token as parquet, {1e6 * middle.bank / one.work.response_tokens:.2f} us a token in one thread beside the training step; it keeps up until {bank.breaks_at:,.0f} tokens
a second of the whole loop. Two rollouts may wait; a third blocks the manager, so a slow disk slows the run instead of filling memory.

**Weight sync.** Weights leave from trainer rank 0 in buckets of 512 MiB: each is gathered over tensor and pipeline ranks to rank 0, then
handed over (shared GPUs) or broadcast to all engines in one group. The source's link bounds it, so seconds grow with the student
and not with the number of engines; starting the group is once a run. Engines do not sample meanwhile.

**The slowest response.** At 32k tokens the last responses decode alone: steps of the longest response bound `generate` whatever the
number of GPUs, which is why doubling GPUs stops paying at the bottom of the tables. `--partial-rollout` and
`--over-sampling-batch-size` trade that wait for stale or dropped responses; this page counts neither. `train_async.py` trains meanwhile.
""".splitlines()  # noqa: E501


def page() -> str:
    rates = load_rates(RATES)
    lines, plans = [INTRO.rstrip("\n"), "", *measured_table(rates), MECHANICS.rstrip("\n")], []
    for title, *rest in SCENES:
        part, found = scene(rates, title, *rest)
        lines += part
        plans.append(found[-1])
    lines += asynchronous(rates)
    lines += breaking(rates, plans)
    lines += ["", "## Rates", "", "| rate | value | status | from |", "|---|---|---|---|"]
    ordered = sorted(rates.rates.values(), key=lambda r: (STATUSES.index(r.status), r.name))
    lines += [f"| {r.name} | {r.value:.4g} {r.unit} | {r.status} | {r.source}: {r.how} |" for r in ordered]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when the page is out of date")
    args = parser.parse_args(argv)
    text = page()
    if args.check:
        if not PAGE.is_file() or PAGE.read_text() != text:
            print(f"{PAGE} is out of date; run tools/make_scaling_page.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text)
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
