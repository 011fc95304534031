"""--moe-aux-loss-coeff: its gradient is that of the Switch loss of a dense run, times the coefficient, at every layout."""

import copy

import mt_tiny
import numpy as np
import pytest

COEFFICIENT = 0.5
ONE = dict(ranks=1, copies=1)
LAYOUTS = {
    "one": ONE,
    "in_one_micro_batch": dict(ranks=1, copies=2),
    "in_two_micro_batches": dict(ranks=1, copies=2, max_tokens_per_gpu=40),
    "dp2": dict(ranks=2, copies=2),
    "ep2": dict(ranks=2, copies=2, expert_model_parallel_size=2),
    "tp2_sp": dict(ranks=2, copies=1, tensor_model_parallel_size=2, sequence_parallel=True),
    "cp2": dict(ranks=2, copies=1, context_parallel_size=2),
    "pp2": dict(ranks=2, copies=1, pipeline_model_parallel_size=2),
    "all_rows": dict(ranks=1, copies=1, opd_last_layer_rows="all"),
    "recompute": dict(ranks=1, copies=1, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}
QUICK = ("in_two_micro_batches", "cp2")


def batch(copies: int) -> dict:
    """One sequence of 32 tokens with 8 rows, as often as asked: no padding in any layout."""
    drawn = mt_tiny.make_data(3, samples=1)
    length = drawn["response_lengths"][0] = 28
    rng = np.random.default_rng(5)
    ids = np.stack([rng.permutation(mt_tiny.VOCAB)[:4] for _ in range(length)]).astype(np.int32)
    weight = np.zeros(length, np.float32)
    weight[[0, 3, 5, 11, 16, 19, 23, 27]] = 1.0
    drawn |= {
        "tokens": [rng.integers(0, mt_tiny.VOCAB, 33).astype(np.int32)], "loss_masks": [np.ones(length, np.float32)], "opd_weights": [weight],
        "teacher_topk_ids": [ids], "teacher_topk_logprobs": [np.log(rng.dirichlet(np.ones(5), length)[:, :4] + 1e-6).astype(np.float32)],
        "rollout_log_probs": [np.full(length, -4, np.float32)], "teacher_log_probs": [np.full(length, -4, np.float32)],
    }  # fmt: skip
    out = {k: [copy.deepcopy(drawn[k][0]) for _ in range(copies)] for k in (
        "tokens", "loss_masks", "opd_weights", "teacher_topk_ids", "teacher_topk_logprobs", "rollout_log_probs", "teacher_log_probs")}  # fmt: skip
    out |= {"response_lengths": [length] * copies, "sample_indices": list(range(copies)), "rewards": [0.0] * copies}
    out["steps"] = [{"indices": list(range(copies)), **mt_tiny.counts(out)}]
    return out


def balancing_gradient(folder, last_layer_rows: bool) -> dict[str, np.ndarray]:
    """Of COEFFICIENT x sum over layers of E sum_e f_e P_e, by name."""
    import mt_reference
    import torch

    data, model = batch(1), mt_reference.load(folder)
    tokens = torch.from_numpy(data["tokens"][0][:32].astype(np.int64))
    logits = model(tokens[None], output_router_logits=True).router_logits
    rows = 33 - 28 + np.flatnonzero(data["opd_weights"][0]) - 1
    total = torch.zeros(())
    for number, layer in enumerate(logits):
        layer = layer.reshape(32, -1)
        layer = layer[rows] if last_layer_rows and number == len(logits) - 1 else layer
        score = layer.softmax(-1)
        k = model.config.num_experts_per_tok
        share = torch.zeros_like(score).scatter(1, score.topk(k, 1).indices, 1.0).mean(0) / k
        total = total + score.shape[1] * (share * score.mean(0)).sum()
    (COEFFICIENT * total).backward()
    return {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in LAYOUTS])
def test_the_balancing_loss_is_a_mean_over_the_tokens_of_the_step(pool, models, layout):
    how = dict(LAYOUTS[layout])
    common = dict(model=models("qwen3_moe"), data=batch(how.pop("copies")), steps=0, max_tokens_per_gpu=128) | how
    without, found = (pool.run("train", moe_aux_loss_coeff=c, **common)[0]["gradients"] for c in (0.0, COEFFICIENT))
    expected = balancing_gradient(models("qwen3_moe"), layout != "all_rows")
    routers = [n for n in expected if n.endswith("mlp.gate.weight")]
    assert len(routers) == 4 and min(np.abs(expected[n]).max() for n in routers) > 1e-3
    for name in (*routers, "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        error = np.abs(found[name] - without[name] - expected[name]).max() / np.abs(expected[name]).max()
        assert error < 1e-4, f"{name}: {error:.1e}"
