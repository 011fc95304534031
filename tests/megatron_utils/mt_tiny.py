"""Tiny random models of every supported family, and rollout data for them: what the parity tests train."""

from __future__ import annotations

from pathlib import Path

import numpy as np

VOCAB = 128
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def config(family: str, tied: bool = False, **changes):
    """transformers' config object of a tiny model."""
    from slime.backends.sglang_utils.cpu_support import install_torchvision_schema

    install_torchvision_schema()
    import transformers as hf

    kwargs = {**COMMON, "tie_word_embeddings": tied, **changes}
    if family == "qwen3":
        return hf.Qwen3Config(head_dim=16, rope_parameters=ROPE, **kwargs)
    if family == "qwen2":
        return hf.Qwen2Config(rope_parameters=ROPE, **{**kwargs, "hidden_size": kwargs["hidden_size"] * 2})
    if family == "llama":
        return hf.LlamaConfig(rope_parameters=LLAMA_ROPE, head_dim=8, **kwargs)
    if family == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
        return hf.Qwen3MoeConfig(head_dim=16, rope_parameters=ROPE, **{**experts, **kwargs})
    raise ValueError(family)


def make_model(folder: Path, family: str = "qwen3", tied: bool = False, seed: int = 0, **changes) -> Path:
    """Saves a random model with weights large enough for its outputs to matter; returns the folder."""
    cfg = config(family, tied, **changes)
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(cfg, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.2 * torch.randn_like(p) if "norm" in name else 0.15 * torch.randn_like(p))
    model.save_pretrained(folder)
    return Path(folder)


def make_data(seed: int = 0, samples: int = 6, k: int = 4, vocab: int = VOCAB, longest: int = 24, kept: float = 0.4) -> dict:
    """Random rollout data of one optimizer step for all samples: the manifest's per-sample lists, and "steps"."""
    rng = np.random.default_rng(seed)
    prompts, lengths = rng.integers(1, 9, samples), rng.integers(2, longest, samples)
    data: dict = {"response_lengths": [int(n) for n in lengths], "sample_indices": list(range(samples)), "rewards": [0.0] * samples}
    names = ("tokens", "loss_masks", "opd_weights", "rollout_log_probs", "teacher_log_probs", "teacher_topk_ids",
             "teacher_topk_logprobs", "student_topk_ids", "student_topk_logprobs", "teacher_at_student_ids")  # fmt: skip
    data.update({n: [] for n in names})
    for p, n in zip(prompts, lengths, strict=True):
        valid = rng.random(n) < 0.9
        weight = (valid & (rng.random(n) < kept)).astype(np.float32) * rng.choice([1.0, 0.5], n).astype(np.float32)
        data["tokens"].append(rng.integers(0, vocab, p + n).astype(np.int32))
        data["loss_masks"].append(valid.astype(np.float32))
        data["opd_weights"].append(weight)
        data["rollout_log_probs"].append((-4 - rng.random(n)).astype(np.float32))
        data["teacher_log_probs"].append((-4 - 2 * rng.random(n)).astype(np.float32))
        for side in ("teacher", "student"):
            ids = np.stack([rng.permutation(vocab)[:k] for _ in range(n)]).astype(np.int32)
            mass = rng.dirichlet(np.ones(k + 1), n)[:, :k].astype(np.float32)
            data[f"{side}_topk_ids"].append(ids)
            data[f"{side}_topk_logprobs"].append(np.log(mass + 1e-6))
        data["teacher_at_student_ids"].append(np.log(rng.dirichlet(np.ones(k + 1), n)[:, :k].astype(np.float32) + 1e-6))
    data["steps"] = [{"indices": list(range(samples)), **counts(data)}]
    return data


def counts(data: dict) -> dict:
    weights = data["opd_weights"]
    return {
        "kept_tokens": float(sum(w.sum(dtype=np.float64) for w in weights)),
        "kept_count": int(sum((w != 0).sum() for w in weights)),
        "valid_tokens": int(sum(m.sum() for m in data["loss_masks"])),
        "num_samples": len(weights),
        "num_samples_kept": int(sum(bool((w != 0).any()) for w in weights)),
    }


def shard(data: dict, rank: int, size: int) -> dict:
    """The share of data-parallel rank `rank`: every size-th sample, with the whole batch's counts."""
    own = list(range(rank, len(data["tokens"]), size))
    out = {k: [v[i] for i in own] for k, v in data.items() if k != "steps"}
    out["steps"] = [{**data["steps"][0], "indices": list(range(len(own)))}]
    return out


def shard_steps(data: dict, rank: int, size: int) -> dict:
    """Like `shard` for data of several steps; one data-parallel rank only."""
    assert size == 1
    return data
