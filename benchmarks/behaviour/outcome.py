"""What came of the runs: accuracy and KL on frozen contexts by selector and budget, the regression of gains, and the report."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from scipy import stats

from benchmarks.behaviour.plan import OWN_BUDGET, Run
from benchmarks.behaviour.pretrain import autocast, padded, solved
from benchmarks.behaviour.sizes import Size
from benchmarks.behaviour.stacked import Stack
from examples.reasoning import corpus
from ta_opd.fixed_context import bank as context_bank
from ta_opd.fixed_context.dense import row_metrics
from ta_opd.fixed_context.gain import GainConfig, analyze_gain
from ta_opd.fixed_context.hf import import_transformers
from ta_opd.fixed_context.join import join_baseline
from ta_opd.fixed_context.sampling import SamplingConfig, sample_bank
from ta_opd.fixed_context.scoring import ScoringConfig, score_contexts
from ta_opd.fixed_context.tables import write_table

SHOWN = ("full", "random", "entropy", "divergence", "tip", "compatibility", "dlearn_high", "ca_softor", "q3")
REGRESSED = ("full", "dlearn_high", "entropy")


class Frozen:
    """Responses of the initial student to held-out prompts, never trained on: what every run is measured on before and after."""

    def __init__(self, folder: Path, problems: list[corpus.Problem], size: Size, teacher, device: torch.device):
        self.device, self.k, self.folder = device, size.k, folder
        path = folder / "context_bank.parquet"
        if not path.is_file():
            prompts = [{"prompt": " ".join(p.prompt), "label": p.label, "line": i} for i, p in enumerate(problems)]
            config = SamplingConfig(num_contexts=size.contexts, max_response_tokens=size.response, device=device.type, dtype="float32", seed=41717)
            context_bank.write_bank(path, *sample_bank(prompts, str(folder / "student"), config))
        self.bank = context_bank.load_contexts(path)
        ids = padded([list(map(int, t)) for t in self.bank.tokens], corpus.PAD_ID)
        slots = torch.arange(ids.shape[1] - 1)
        begin, length = torch.tensor(self.bank.prompt_len.tolist()), torch.tensor(self.bank.scored_len.tolist())
        inside = (slots >= begin[:, None] - 1) & (slots < (begin + length)[:, None] - 1)
        self.ids, self.rows = ids.to(device), torch.nonzero(inside.flatten())[:, 0].to(device)
        self.target_L = self.ids[:, 1:].flatten()[self.rows]
        with torch.no_grad():
            self.teacher_LV = torch.cat([teacher(input_ids=part[:, :-1], use_cache=False).logits.float() for part in self.ids.split(64)]).flatten(0, 1)[self.rows]

    @torch.no_grad()
    def kl(self, stack: Stack) -> list[tuple[float, float]]:
        """(KL(teacher || student), KL(student || teacher)) of every run, means over the positions, full vocabulary."""
        runs = next(iter(stack.weights.values())).shape[0]
        with autocast(self.device):
            hidden = torch.cat([stack.hidden(part[:, :-1].expand(runs, *part[:, :-1].shape)) for part in self.ids.split(64)], 1)
        out = []
        for run in range(runs):
            rows_Lh = hidden[run].flatten(0, 1)[self.rows].float()
            found = row_metrics(rows_Lh @ stack.heads()[run].float().T, self.teacher_LV, self.target_L, (self.k,))
            out.append((float(found["KLf"].mean()), float(found["KLr"].mean())))
        return out


def measure(stack: Stack, runs: list[Run], frozen: Frozen, heldout, validation, size: Size) -> list[dict]:
    """One row a run: greedy accuracy on held-out and validation problems, by domain, and KL on the frozen contexts."""
    right, chosen = solved(stack, heldout, size.response), solved(stack, validation, size.response)
    out = []
    for i, (run, (forward, reverse)) in enumerate(zip(runs, frozen.kl(stack), strict=True)):
        by_domain = {d: [ok for ok, p in zip(right[i], heldout, strict=True) if p.domain == d] for d in size.level.domains}
        out.append({"run": run.name, **asdict(run.arm), "seed": run.seed, "lr": run.lr, "accuracy": float(np.mean(right[i])),
                    "validation": float(np.mean(chosen[i])), "KLf": forward, "KLr": reverse,
                    **{f"accuracy_{d}": float(np.mean(v)) if v else math.nan for d, v in by_domain.items()}})  # fmt: skip
    return out


def interval(values) -> tuple[float, float]:
    """(mean, half width of the 95 % t-interval over seeds); NaN width for one seed."""
    x = np.asarray(list(values), float)
    if len(x) < 2:
        return float(x.mean()), math.nan
    return float(x.mean()), float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))


def rate_of_each_arm(runs: pd.DataFrame) -> dict[tuple[str, float, str], float]:
    """(selector, budget, loss) -> the better learning rate: higher validation accuracy over the seeds that all rates have, then lower KL."""
    out = {}
    for key, arm in runs.groupby(["selector", "budget", "loss"], sort=False):
        shared = set.intersection(*(set(part["seed"]) for _, part in arm.groupby("lr")))
        judged = arm[arm["seed"].isin(shared)] if shared else arm
        means = judged.groupby("lr").agg(validation=("validation", "mean"), KLf=("KLf", "mean"))
        out[key] = means.sort_values(["validation", "KLf"], ascending=[False, True]).index[0]
    return out


def better_rate(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs at each arm's better learning rate; rates_tried: of how many."""
    rates = rate_of_each_arm(runs)
    out = [arm[arm["lr"] == rates[key]].assign(rates_tried=arm["lr"].nunique()) for key, arm in runs.groupby(["selector", "budget", "loss"], sort=False)]
    return pd.concat(out, ignore_index=True)


def arm_table(best: pd.DataFrame) -> pd.DataFrame:
    """One row an arm: means and 95 % intervals over seeds of accuracy and both KLs."""
    rows = []
    for (selector, budget, loss), arm in best.groupby(["selector", "budget", "loss"], sort=False):
        row = {"loss": loss, "selector": selector, "budget": budget, "lr": arm["lr"].iloc[0], "seeds": arm["seed"].nunique()}
        for name in ("accuracy", "KLf", "KLr"):
            row[name], row[f"{name}_ci"] = interval(arm[name])
        if "kept" in arm:
            row |= {"sampled_tokens": arm["tokens"].mean(), "kept_tokens": arm["kept"].mean()}
        rows.append(row)
    return pd.DataFrame(rows).sort_values(["loss", "budget", "accuracy"], ascending=[True, False, False]).reset_index(drop=True)


def picture(table: pd.DataFrame, start: dict, path: Path, teacher: float) -> None:
    """Accuracy and forward KL of every selector, a pair of panels a loss, one colour a budget; the initial student and full supervision as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = list(dict.fromkeys(table["loss"]))
    names = [n for n in table.groupby("selector")["accuracy"].mean().sort_values().index if n != "full"]
    budgets = sorted(b for b in table["budget"].unique() if b < 1)
    colours = dict(zip(budgets, plt.get_cmap("viridis")(np.linspace(0.1, 0.8, max(len(budgets), 1))), strict=True))
    figure, axes = plt.subplots(1, 2 * len(losses), figsize=(2.6 + 3.3 * 2 * len(losses), 2.2 + 0.27 * len(names)), sharey=True, squeeze=False, layout="constrained")
    labels = {"accuracy": "held-out problems solved, %", "KLf": "KL(teacher || student), frozen contexts, nats"}
    for axis, (loss, name) in zip(axes[0], ((loss, name) for loss in losses for name in labels), strict=True):
        scale, part = 100 if name == "accuracy" else 1, table[table["loss"] == loss]
        for i in range(0, len(names), 2):
            axis.axhspan(i - 0.5, i + 0.5, color="0.96", zorder=0)
        for b, budget in enumerate(budgets):
            arm = part[part["budget"] == budget].set_index("selector")
            at = [i + 0.24 * ((len(budgets) - 1) / 2 - b) for i, n in enumerate(names) if n in arm.index]
            there = arm.loc[[n for n in names if n in arm.index]]
            axis.errorbar(scale * there[name], at, xerr=scale * there[f"{name}_ci"].fillna(0), fmt="o", ms=3.5, color=colours[budget], label=f"{budget:.0%} of tokens", lw=1)
        full = part[part["selector"] == "full"]
        if len(full):
            value, half = scale * full[name].iloc[0], scale * full[f"{name}_ci"].iloc[0]
            axis.axvline(value, color="black", lw=1, label="full (100 %) and its interval")
            if np.isfinite(half):
                axis.axvspan(value - half, value + half, color="black", alpha=0.08, lw=0, zorder=0)
        axis.axvline(scale * start[name], color="crimson", lw=1, ls="--", label="initial student")
        axis.set_xlim(*_limits([*(scale * part[name]), scale * start[name]], scale * part[f"{name}_ci"]))
        axis.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) - 0.4), xlabel=labels[name])
        axis.tick_params(axis="y", length=0, labelsize=9)
        axis.grid(axis="x", color="0.88")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.set_title(loss, loc="left", fontsize=10)
    seeds = sorted(table["seeds"].unique())
    over = "one seed (no intervals)" if seeds[-1] == 1 else f"means and 95 % t-intervals over {seeds[-1] if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]}'} seeds"
    figure.suptitle(f"On-policy distillation with each selector: {over}, equal numbers of responses\n"
                    f"initial student solves {start['accuracy']:.1%}, teacher {teacher:.1%}; selectors by mean accuracy; intervals may go on beyond the axes", fontsize=11)  # fmt: skip
    handles = dict(pair[::-1] for axis in axes[0] for pair in zip(*axis.get_legend_handles_labels(), strict=True))
    figure.legend(handles.values(), handles.keys(), fontsize=9, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _limits(values: list[float], halves: pd.Series) -> tuple[float, float]:
    """An axis for all values, none of them negative, and for intervals of usual width; with few seeds a single one may be ten times as wide."""
    beside = 1.5 * float(halves.median()) if halves.notna().any() else 0.0
    room = max(beside, 0.05 * (max(values) - min(values)), 1e-3)
    return max(min(values) - room, -0.02 * max(values)), max(values) + room


def export(state: dict, like: Path, folder: Path) -> Path:
    """An HF directory of a run's weights, config and tokenizer as in `like`."""
    transformers = import_transformers()
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(str(like)))
    model.load_state_dict(state)
    model.float().save_pretrained(str(folder))
    for file in like.glob("tokenizer*"):
        shutil.copy2(file, folder / file.name)
    return folder


def regressions(frozen: Frozen, states: Path, best: pd.DataFrame, device: torch.device, say, deadline: float) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, pd.DataFrame]]:
    """(r2 of every model, coefficients, joined tables by run) of the gains of those kept runs that are at their arm's better rate.

    states: folder of NAME.pt. No run is begun after `deadline` (seconds of time.time); the first seed's come first.
    """
    config = ScoringConfig(topk=(frozen.k,), student_device=device.type, teacher_device=device.type, dtype="float32", workspace_gib=0.5)
    home, summaries, coefficients, tables = frozen.folder, [], [], {}
    wanted = [run for run in best.sort_values(["seed", "budget"], kind="stable")["run"] if (states / f"{run}.pt").is_file()]
    if not wanted:
        return pd.DataFrame(), pd.DataFrame(), tables
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        before, meta = score_contexts(frozen.bank, str(home / "student"), str(home / "teacher"), config, Path(scratch) / "parts0")
        for number, name in enumerate(wanted, 1):
            if time.time() > deadline:
                say(f"  {len(wanted) - number + 1} of {len(wanted)} regressions are left out: the time is over")
                break
            folder = export(torch.load(states / f"{name}.pt"), home / "student", Path(scratch) / f"run{number}")
            after, record = score_contexts(frozen.bank, str(folder), str(home / "teacher"), config, Path(scratch) / f"parts{number}")
            shutil.rmtree(folder)
            tables[name] = join_baseline(after, before, after_meta=record, before_meta=meta)
            found = analyze_gain(tables[name], GainConfig(bootstrap=300))
            row = best[best["run"] == name].iloc[0]
            who = {"selector": row["selector"], "budget": row["budget"], "loss": row["loss"], "seed": row["seed"]}
            summaries.append(found.regressions.assign(**who, q3_high_minus_low_C=found.summary["bootstrap_mean_diff"].iloc[0],
                                                      q3_ci_low=found.summary["bootstrap_ci_low"].iloc[0], q3_ci_high=found.summary["bootstrap_ci_high"].iloc[0]))  # fmt: skip
            coefficients.append(found.coefficients.assign(**who))
            say(f"  gains of {name}: mean {tables[name]['G_KLf_abs'].mean():.4f} nats")
    if not tables:
        return pd.DataFrame(), pd.DataFrame(), tables
    return pd.concat(summaries, ignore_index=True), pd.concat(coefficients, ignore_index=True), tables


def report(folder: Path, best: pd.DataFrame, rollouts: pd.DataFrame, tables: dict[str, pd.DataFrame], start: dict, facts: dict, size: Size) -> Path | None:
    """The project's report of the runs at 10 % (or the middle budget) and full supervision, of the last loss that has any."""
    from ta_opd.report.build import Options, build_report
    from ta_opd.report.loading import FIXED_CONTEXT_FILE

    budget = sorted(size.budgets)[len(size.budgets) // 2]
    shown = best[best["selector"].isin(SHOWN) & best["budget"].isin((budget, 1.0))]
    if shown.empty:
        return None
    loss = [loss for loss in size.losses if loss in set(shown["loss"])][-1]
    chosen = shown[shown["loss"] == loss]
    home = folder / "report_runs"
    shutil.rmtree(home, ignore_errors=True)
    for row in chosen.itertuples():
        run = home / row.run
        run.mkdir(parents=True)
        own = rollouts[rollouts["run"] == row.run]
        lines = [{"rollout_id": int(r.rollout), "rollout/reverse_kl_valid": r.sampled_reverse_kl, "rollout/reverse_kl_kept": r.sampled_reverse_kl_kept, "rollout/kept_tokens": r.kept, "rollout/valid_tokens": r.tokens,
                  "rollout/response_length": r.tokens / size.prompts, "train/loss": r.loss, "train/grad_norm": r.grad_norm} for r in own.itertuples()]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        evals = [{"rollout_id": -1, "dataset": "heldout", "accuracy": start["accuracy"]}, {"rollout_id": size.rollouts - 1, "dataset": "heldout", "accuracy": row.accuracy}]
        (run / "eval.jsonl").write_text("".join(json.dumps(x) + "\n" for x in evals))
        config = {"opd_budget_mask": row.selector, "opd_budget_ratio": float(row.budget), "opd_loss_type": loss, "lr": float(row.lr), "seed": int(row.seed),
                  "rollout_batch_size": size.prompts, "n_samples_per_prompt": 1, "opd_topk_metrics_k": size.k, "num_rollout": size.rollouts}  # fmt: skip
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        if row.run in tables:
            write_table(run / FIXED_CONTEXT_FILE, tables[row.run], {"kind": "fixed_context_metrics"})
    suite = {"title": "Selectors on generated multi-step reasoning", "teacher_accuracy": facts["teacher"]["heldout"], "tokenizer": str(folder / "student"),
             "facts": [f"teacher {facts['teacher']['parameters'] / 1e6:.1f} M, student {facts['student']['parameters'] / 1e6:.1f} M parameters",
                       f"teacher solves {facts['teacher']['heldout']:.1%}"]}  # fmt: skip
    (home / "suite.json").write_text(json.dumps(suite, indent=1))
    return build_report(home, folder / "report.html", Options(tokenizer=str(folder / "student"))).html


def sentences(table: pd.DataFrame) -> list[str]:
    """What the table says about dlearn_high, as it comes out."""
    out = []
    for (loss, budget), part in table[table["budget"] < 1].groupby(["loss", "budget"]):
        own = part[part["selector"] == "dlearn_high"]
        others = part[~part["selector"].isin(("dlearn_high", *OWN_BUDGET))]
        if own.empty or others.empty:
            continue
        rank = 1 + int((others["accuracy"] > own["accuracy"].iloc[0]).sum())
        best = part.sort_values("accuracy", ascending=False).iloc[0]
        out.append(f"{loss}, {budget:.0%}: dlearn_high {own['accuracy'].iloc[0]:.3f} (+- {own['accuracy_ci'].iloc[0]:.3f}), place {rank} of {len(others) + 1}; "
                   f"best {best['selector']} {best['accuracy']:.3f} (+- {best['accuracy_ci']:.3f})")  # fmt: skip
    return out
