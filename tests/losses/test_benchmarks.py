"""The benchmarks run on any machine with --quick, check their own numbers and write what they printed."""

from __future__ import annotations

import json

import pytest

from benchmarks import divergence, loss_rows, measure, optimizer_step, step_account, vocab_rows
from benchmarks.reference_trunk import QWEN3_1_7B


def _run(module, monkeypatch, out, *flags) -> dict:
    monkeypatch.setattr("sys.argv", [f"benchmarks/{module.__name__.rsplit('.', 1)[1]}.py", "--quick", "--out", str(out), *flags])
    assert module.main() == 0
    (file,) = out.iterdir()
    return json.loads(file.read_text())


def test_divergence(tmp_path, monkeypatch, capsys):
    result = _run(divergence, monkeypatch, tmp_path)
    assert {row["way"] for row in result["tables"]["divergence"]} == {"ours", "plain"}
    assert result["verdict"]["errors within tolerance"] and "reverse_kl" in capsys.readouterr().out
    assert result["command"] == "python benchmarks/divergence.py --quick"


def test_vocab_rows(tmp_path, monkeypatch):
    result = _run(vocab_rows, monkeypatch, tmp_path)
    assert {(row["kind"], row["K"], row["way"]) for row in result["tables"]["time"]} >= {("scored", 0, "ours"), ("decoded", 64, "plain")}
    true = vocab_rows.vocab_rows.log_probs

    def off(*given):
        found = true(*given)
        return found._replace(log_probs=found.log_probs + 1e-3)

    monkeypatch.setattr(vocab_rows.vocab_rows, "log_probs", off)
    assert vocab_rows.main() == 1


@pytest.mark.parametrize("flags", [("--part", "head"), ("--part", "step")])
def test_loss_rows(tmp_path, monkeypatch, flags):
    result = _run(loss_rows, monkeypatch, tmp_path, *flags)
    if flags[1] == "head":
        assert {row["way"] for row in result["tables"]["head alone"]} == set(loss_rows.WAYS)
    else:
        assert {row["kept against"] for row in result["tables"]["ratios"]} == {"all, plain", "all, chunked", "all, ours"}


def test_optimizer_step(tmp_path, monkeypatch):
    result = _run(optimizer_step, monkeypatch, tmp_path)
    assert [(r["gradients"], r["state"]) for r in result["tables"]["steps"]] == [(g, w) for g in ("fp32", "bf16") for w in ("device", "host")]
    assert all(r["different weights"] == 0 and r["host over device"] > 0 for r in result["tables"]["ratios"])
    from slime.backends.megatron_utils.host_state import HostState

    true = HostState._update
    monkeypatch.setattr(HostState, "_update", lambda self, *given: (setattr(self, "clip", 1.0), true(self, *given)))  # not clipped
    assert optimizer_step.main() == 1


def test_counted_peaks_are_those_recorded_on_a_gpu():
    found = step_account.tables(QWEN3_1_7B, [16_384, 32_768])
    assert len(found["GiB"]) == 28 and {r["gradients"] for r in found["GiB"]} == {"fp32", "bf16"}
    for r in found["GiB"]:
        assert r["peak"] == pytest.approx(r["recorded peak"], rel=0.015), r


def test_counted_operations_rank_the_ways_as_their_recorded_times():
    for tokens in (16_384, 32_768):
        work = {r["way"]: r for r in step_account.tables(QWEN3_1_7B, [tokens])["TFLOP"]}
        ours = [w for w in work if "ours" in w]
        assert sorted(ours, key=lambda w: work[w]["all"]) == sorted(ours, key=lambda w: work[w]["recorded ms"])
        for row in work.values():
            assert row["all"] == pytest.approx(row["other layers"] + row["last layer"] + row["head"], abs=0.02)


def test_counts_leave_out_what_recompute_does_not_make():
    """Of every layer the last product, as the plan counts it, too."""
    from slime.planning.models import load_model
    from slime.planning.training import operations_of

    s, tokens, model = QWEN3_1_7B, 16_384, load_model("1.7B")
    product = 2 * tokens * s.hidden * s.ffn * s.layers
    rows = step_account.num_rows(tokens, False)
    counted = step_account.flops(s, tokens, "all, ours")["all"] * 1e12
    assert counted == pytest.approx(operations_of(model, tokens, step_account.LENGTH, rows, recompute=True)[0], rel=1e-3)
    kept = step_account.num_rows(tokens, True)
    last = step_account.flops(s, tokens, "kept, ours, last layer's MLP on kept rows")["last layer"]
    whole = step_account.flops(s, tokens, "kept, ours, last layer whole")["last layer"]
    assert (whole - last) * 1e12 == pytest.approx((4 * 3 - 1) * 2 * (tokens - kept) * s.hidden * s.ffn)  # three products four times, less the unread one
    done, useful = operations_of(model, tokens, 4096, 0, recompute=True)
    assert done - useful == pytest.approx(model.trunk_operations(tokens) + model.attention_operations(tokens, 4096) - product)
    assert operations_of(model, tokens, 4096, 0, recompute=False) == (useful, useful)
    experts = load_model("30B-A3B")
    done, useful = operations_of(experts, tokens, 4096, 0, recompute=True)
    assert done - useful == pytest.approx(experts.trunk_operations(tokens) + experts.attention_operations(tokens, 4096))


def test_wrong_numbers_fail_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(divergence, "divergence_from_logits", lambda s, t, kind, **_: divergence.plain(s * 1.1, t, kind))
    monkeypatch.setattr("sys.argv", ["benchmarks/divergence.py", "--quick", "--out", str(tmp_path)])
    assert divergence.main() == 1


def test_table_and_errors():
    import torch

    text = measure.table([{"a": 1.234567, "b": None}, {"a": 1234.5, "c": "x"}])
    assert text.splitlines() == ["a     b  c", "1.23  -  -", "1234  -  x"]
    assert measure.relative_error(torch.tensor([torch.nan]), torch.ones(1)) == float("inf")
    assert measure.relative_error(torch.tensor([3.0]), torch.tensor([2.0])) == 0.5
