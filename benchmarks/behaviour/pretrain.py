"""Teacher and student: Qwen3 models trained from scratch on the corpus, each in its own writer's style, kept in a folder."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.behaviour.sizes import Pretrain, Size
from benchmarks.behaviour.stacked import Stack
from examples.reasoning import corpus
from ta_opd.errors import NumericsError
from ta_opd.fixed_context.hf import import_transformers

IGNORED = -100
SHARD = "15MB"  # of one file of weights
HELDOUT_SEED, VALIDATION_SEED, TRAIN_SEED, ROLLOUT_SEED = 11, 12, 100, 50


def autocast(device: torch.device):
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; the host does not wait for what the device has still to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def make_model(spec: Pretrain):
    """A Qwen3ForCausalLM with random weights of the spec's seed."""
    transformers = import_transformers()
    w = spec.width
    config = transformers.Qwen3Config(
        vocab_size=corpus.VOCABULARY, hidden_size=w.hidden, intermediate_size=w.ffn, num_hidden_layers=w.layers, num_attention_heads=w.heads,
        num_key_value_heads=w.kv_heads, head_dim=w.head_dim, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, eos_token_id=corpus.END_ID, pad_token_id=corpus.PAD_ID,
        initializer_range=0.02 if w.hidden >= 256 else 0.05,
    )  # fmt: skip
    torch.manual_seed(spec.seed)
    return transformers.Qwen3ForCausalLM(config)


def problem_sets(size: Size) -> tuple[list[corpus.Problem], list[corpus.Problem]]:
    """(held-out, validation) problems, without slips, of prompts that nothing is trained on."""
    heldout = corpus.make_problems(size.heldout, HELDOUT_SEED, corpus.TEACHER, size.level)
    validation = corpus.make_problems(size.validation, VALIDATION_SEED, corpus.TEACHER, size.level, {p.prompt for p in heldout})
    return heldout, validation


def padded(rows: list[list[int]], fill: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def batch_of(problems: list[corpus.Problem]) -> tuple[Tensor, Tensor]:
    """(ids [B, S], targets [B, S]); targets are IGNORED outside the solution and its end."""
    rows = [(corpus.encode(p.prompt), [*corpus.encode(p.solution), corpus.END_ID]) for p in problems]
    ids = padded([a + b for a, b in rows], corpus.PAD_ID)
    return ids, padded([[IGNORED] * len(a) + b for a, b in rows], IGNORED)


def solved(stack: Stack, problems: list[corpus.Problem], new_tokens: int, chunk: int = 256) -> list[list[bool]]:
    """[run][problem]: whether the greedy answer is right."""
    out: list[list[bool]] = [[] for _ in range(next(iter(stack.weights.values())).shape[0])]
    for begin in range(0, len(problems), chunk):
        part = problems[begin : begin + chunk]
        prompts = [corpus.encode(p.prompt) for p in part]
        ids_BP, lengths_B = padded(prompts, corpus.PAD_ID).to(stack.device), torch.tensor([len(p) for p in prompts], device=stack.device)
        runs = len(out)
        with autocast(stack.device):
            found = stack.sample(ids_BP.expand(runs, *ids_BP.shape), lengths_B.expand(runs, -1), new_tokens, corpus.END_ID, corpus.PAD_ID, 0.0, None)
        for run, rows in enumerate(found.tolist()):
            for problem, prompt, row in zip(part, prompts, rows, strict=True):
                out[run].append(corpus.answer_of(row[len(prompt) :]) == problem.label)
    return out


def train(spec: Pretrain, style: corpus.Style, size: Size, device: torch.device, avoid: set, check: list[corpus.Problem], say) -> tuple:
    """(model, steps taken, share of `check` solved). Raises NumericsError on a loss that is not finite."""
    model = make_model(spec)
    stack = Stack.copies(model, 1, device)
    parameters = stack.require_grad()
    problems = corpus.make_problems(spec.problems, TRAIN_SEED + spec.seed, style, size.level, avoid)
    optimizer = torch.optim.AdamW(parameters, lr=spec.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda")
    generator, share, taken = torch.Generator().manual_seed(spec.seed), 0.0, spec.steps
    for step in range(spec.steps):
        rate = spec.lr * min(1.0, (step + 1) / spec.warmup) * 0.5 * (1 + math.cos(math.pi * step / spec.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(problems), (spec.batch,), generator=generator).tolist()
        loss = cross_entropy(stack, *batch_of([problems[i] for i in chosen]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        last = step == spec.steps - 1
        if last or (spec.stop_at is not None and (step + 1) % spec.check_every == 0):
            if not torch.isfinite(loss):
                raise NumericsError(f"pretraining, step {step}: expected a finite loss, got {loss.item()}; use a smaller learning rate")
            share = sum(solved(stack, check, size.response)[0]) / len(check)
            say(f"  step {step + 1}: loss {loss.item():.3f}, {share:.1%} of the validation problems")
            if spec.stop_at is not None and share >= spec.stop_at:
                taken = step + 1
                break
    model.load_state_dict(stack.state_of(0))
    return model.to(device).eval(), taken, share


def cross_entropy(stack: Stack, ids_BS: Tensor, targets_BS: Tensor) -> Tensor:
    """Mean over the targets that are not IGNORED, of a stack of one model; ids and targets on the CPU."""
    wanted_BS = targets_BS[:, 1:] != IGNORED
    ends_B = ids_BS.shape[1] - 1 - wanted_BS.flip(1).int().argmax(1)  # positions up to the last that predicts a target
    row_L = torch.nonzero(wanted_BS.flatten())[:, 0]
    target_L = targets_BS[:, 1:].flatten()[row_L]
    ids_BS, ends_B, row_L, target_L = (upload(t, stack.device) for t in (ids_BS, ends_B, row_L, target_L))
    with autocast(stack.device):
        hidden = stack.hidden(ids_BS[None, :, :-1], ends_B[None])
        logits_LV = stack.logits(hidden.flatten(0, 2).index_select(0, row_L)[None])[0]
    return torch.nn.functional.cross_entropy(logits_LV, target_L)


def models(size: Size, folder: Path, device: torch.device, say=print) -> tuple:
    """(teacher, student, facts) as transformers models on the device, read from `folder` where it holds them."""
    heldout, validation = problem_sets(size)
    avoid = {p.prompt for p in heldout + validation}
    facts_file = folder / "models.json"
    facts = json.loads(facts_file.read_text()) if facts_file.is_file() else {}
    wanted = repr((size.teacher, size.student, size.level))
    found = {}
    for role, spec, style in (("teacher", size.teacher, corpus.TEACHER), ("student", size.student, corpus.STUDENT)):
        if facts.get("made_of") == wanted and (folder / role / "config.json").is_file():
            found[role] = import_transformers().AutoModelForCausalLM.from_pretrained(str(folder / role), dtype=torch.float32).to(device).eval()
            continue
        say(f"{role}: {spec.width.parameters / 1e6:.2f} M parameters, up to {spec.steps} steps of {spec.batch}")
        began = time.perf_counter()
        model, steps, share = train(spec, style, size, device, avoid, validation, say)
        model.save_pretrained(str(folder / role), max_shard_size=SHARD)
        corpus.build_tokenizer().save_pretrained(str(folder / role))
        accuracy = sum(solved(Stack.copies(model, 1, device), heldout, size.response)[0]) / len(heldout)
        facts[role] = {"parameters": sum(p.numel() for p in model.parameters()), "steps": steps, "validation": share, "heldout": accuracy,
                       "seconds": time.perf_counter() - began}  # fmt: skip
        found[role] = model
    facts["made_of"] = wanted
    facts_file.write_text(json.dumps(facts, indent=1) + "\n")
    return found["teacher"], found["student"], facts
