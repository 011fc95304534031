"""Start-up checks of student and teachers, a few seconds before the first rollout: each line says what was found and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slime.backends.sglang_utils import loop
from slime.backends.sglang_utils.client import SGLangClient
from slime.backends.sglang_utils.server_flags import CONTEXT_SLACK
from slime.utils.misc import load_tokenizer
from ta_opd.errors import TaOpdError

TEXT = "On-policy distillation: 12 + 34 = 46, so the answer is 46.\nA46"
# Largest difference of a log-prob that arithmetic alone explains, by dtype of the engines
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
_LATER = "; the student's weights are sent to them next"
_TOKENS, _NEW_TOKENS = 64, 8  # of the probe's text and of what is sampled after it, where the context has room


@dataclass
class Check:
    """One line of the table. ok None: not applicable here."""

    name: str
    ok: bool | None
    found: str
    advice: str = ""

    @property
    def failed(self) -> bool:
        return self.ok is False


def probe(args: Any, student: SGLangClient, teachers: dict[str, SGLangClient]) -> list[Check]:
    """All checks of a run. Never raises for a bad service: that is a failed check."""
    return loop.run(_Probe(args, student, teachers).run())


def table(checks: list[Check]) -> list[str]:
    """The checks as lines of text; a failed one is followed by what to do."""
    width = max((len(c.name) for c in checks), default=0)
    lines = []
    for c in checks:
        mark = {True: "ok", False: "FAILED", None: "-"}[c.ok]
        lines.append(f"{c.name:<{width}}  {mark:<6}  {c.found}")
        if c.failed and c.advice:
            lines.append(f"{'':<{width}}          {c.advice}")
    return lines


class _Probe:
    def __init__(self, args, student, teachers):
        self.args, self.student, self.teachers = args, student, teachers
        self.checks: list[Check] = []
        # engines that somebody else started serve what an earlier run has sent them, until this one sends its own
        self.sent_later = bool(getattr(args, "rollout_external_engine_addrs", None))
        self.tolerance = TOLERANCE.get(getattr(args, "sglang_dtype", None) or "bfloat16", 0.25)
        self.tokenizer = load_tokenizer(args.hf_checkpoint, getattr(args, "trust_remote_code", False))
        ids = self.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        context = getattr(args, "rollout_max_context_len", None) or _TOKENS + _NEW_TOKENS
        self.new_tokens = max(1, min(_NEW_TOKENS, context // 2))
        self.ids = [i for i in ids if i >= 0][: max(2, min(_TOKENS, context - self.new_tokens))]

    def add(self, name: str, ok: bool | None, found: str, advice: str = "") -> None:
        self.checks.append(Check(name, ok, found, advice))

    async def run(self) -> list[Check]:
        parts = [self._student()] + [self._teacher(name, client) for name, client in self.teachers.items()]
        for part in parts:
            await part
        return self.checks

    async def _try(self, name: str, coroutine, advice: str):
        try:
            return await coroutine
        except TaOpdError as error:
            self.add(name, False, str(error)[:300], advice)
            return None

    async def _student(self) -> None:
        name, k = "student", max(1, self.args.opd_topk_metrics_k)
        advice = "look at the engine's log in the run directory"
        info = await self._try(f"{name}: reachable", self.student.server_info(), advice)
        if info is None:
            return
        self._context(name, info)
        params = {"temperature": self.args.rollout_temperature, "max_new_tokens": self.new_tokens, "sampling_seed": 7, "ignore_eos": True}
        replies = [
            await self._try(f"{name}: samples at {url}", self.student.generate(self.ids, params, k, prefer=url), advice)
            for url in self.student.urls
        ]
        replies = [r for r in replies if r is not None]
        if not replies:
            return
        reply = replies[0]
        self.add(f"{name}: log-probs and top-{k}", len(reply.log_probs) == len(reply.output_ids) and reply.topk.T == len(reply.log_probs),
                 f"{len(reply.log_probs)} log-probs for {len(reply.output_ids)} tokens")  # fmt: skip
        await self._temperature(reply)
        await self._replicas(name, self.student)

    async def _temperature(self, reply) -> None:
        """Sampled log-probs are at the sampling temperature, scores at 1: at temperature 1 the two must agree."""
        name = "student: temperature"
        if self.args.rollout_temperature != 1.0:
            self.add(name, False, f"--rollout-temperature {self.args.rollout_temperature}; scores are always at temperature 1",
                     "use --rollout-temperature 1.0 with a SGLang teacher")  # fmt: skip
            return
        sequence = [*self.ids, *reply.output_ids]
        score = await self._try(name, self.student.score(sequence, len(reply.output_ids), prefer=reply.url), "see the engine's log")
        if score is not None:
            gap = float(np.abs(score.log_probs - reply.log_probs).max())
            self.add(name, gap <= self.tolerance, f"sampled and scored log-probs differ by at most {gap:.2g}",
                     "the engine returns log-probs of another convention; unset SGLANG_RETURN_ORIGINAL_LOGPROB")  # fmt: skip

    async def _replicas(self, name: str, client: SGLangClient) -> None:
        if len(client.urls) == 1:
            return
        scores = [await self._try(f"{name}: replica {url}", client.score(self.ids, len(self.ids) - 1, prefer=url), "restart that replica")
                  for url in client.urls]  # fmt: skip
        values = [s.log_probs for s in scores if s is not None]
        gap = float(max(np.abs(v - values[0]).max() for v in values)) if values else float("nan")
        agree, later = gap <= self.tolerance, client is self.student and self.sent_later
        self.add(f"{name}: replicas agree", False if len(values) < len(client.urls) else None if later and not agree else agree,
                 f"{len(values)} of {len(client.urls)} answer, largest difference {gap:.2g}{_LATER if later and not agree else ''}",
                 "replicas serve different models, dtypes or weights: give each URL the same one")  # fmt: skip

    async def _teacher(self, key: str, client: SGLangClient) -> None:
        name = "teacher" if key == "default" else f"teacher {key}"
        k = self.args.opd_topk_metrics_k
        length = len(self.ids) - 1
        first = await self._try(f"{name}: returns log-probs", client.score(self.ids, length, k),
                                "a teacher must be a SGLang server that allows return_logprob; check --rm-url")  # fmt: skip
        if first is None:
            return
        self.add(f"{name}: returns log-probs", True, f"{length} positions" + (f", top-{k}" if k else ""))
        # the second time as rollouts do it, from the middle on over a cached beginning: what a server does once for that, it does here
        tail = max(1, length // 2)
        again = await self._try(f"{name}: determinism", client.score(self.ids, tail, k, prefer=first.url), "")
        if again is not None:
            gap = float(np.abs(again.log_probs - first.log_probs[-tail:]).max())
            self.add(f"{name}: determinism", gap <= self.tolerance, f"two scorings of one text differ by at most {gap:.2g}",
                     "the server's batching or another client disturbs it; give the run its own teacher")  # fmt: skip
        await self._replicas(name, client)
        info = await self._try(f"{name}: server_info", client.server_info(), "the server is too old for /server_info")
        if info is None:
            return
        self._context(name, info)
        models = await self._try(f"{name}: model_info", client.model_info(), "")
        path = str(models[0].get("model_path", "")) if models else ""
        await self._vocabulary(name, client, path)
        if path and Path(path).is_dir():
            self._tokenizer(name, path)
            if Path(path).resolve() == Path(self.args.hf_checkpoint).resolve():
                await self._same_model(name, client)
        else:
            self.add(f"{name}: tokenizer", None, f"{path or 'its model'} is not a directory here; only ids were compared")

    async def _same_model(self, name: str, client: SGLangClient) -> None:
        length = len(self.ids) - 1
        ours = await self._try(f"{name}: KL to student", self.student.score(self.ids, length), "")
        theirs = await self._try(f"{name}: KL to student", client.score(self.ids, length), "")
        if ours and theirs:
            gap = float(np.abs(ours.log_probs - theirs.log_probs).max())
            same = gap <= self.tolerance
            self.add(f"{name}: KL to student", None if self.sent_later and not same else same,
                     f"same model on both sides, log-probs differ by at most {gap:.2g}{_LATER if self.sent_later and not same else ''}",
                     "the student's engines do not serve --hf-checkpoint; was another model loaded?")  # fmt: skip

    async def _vocabulary(self, name: str, client: SGLangClient, path: str) -> None:
        student = (getattr(self.args, "student_config", None) or {}).get("vocab_size")
        file = Path(path) / "config.json" if path else None
        if file is None or not file.is_file():
            self.add(f"{name}: vocabulary", None, "size not known from here")
            return
        import json

        teacher = json.loads(file.read_text()).get("vocab_size")
        entries = len(self.tokenizer)
        client.vocab_size = teacher
        note = "" if teacher == student else "; padded sizes differ, the common part is used"
        self.add(f"{name}: vocabulary", bool(teacher and teacher >= entries), f"student {student}, teacher {teacher}, tokenizer {entries}{note}",
                 "the teacher's vocabulary is smaller than the student's tokenizer: the models do not fit")  # fmt: skip

    def _tokenizer(self, name: str, path: str) -> None:
        if getattr(self.args, "allow_tokenizer_mismatch", False):
            self.add(f"{name}: tokenizer", None, "not compared (--allow-tokenizer-mismatch)")
            return
        other = load_tokenizer(path, getattr(self.args, "trust_remote_code", False))
        ours, theirs = self.tokenizer.get_vocab(), other.get_vocab()  # each call builds the whole dict
        differing = sum(theirs.get(t) != i for t, i in ours.items())
        specials = {k: (getattr(self.tokenizer, k), getattr(other, k)) for k in ("eos_token_id", "pad_token_id", "bos_token_id")}
        unequal = {k: v for k, v in specials.items() if v[0] != v[1]}
        same = differing == 0 and "eos_token_id" not in unequal
        self.add(f"{name}: tokenizer", same, f"{differing} entries differ; special tokens {'equal' if not unequal else unequal}",
                 "distillation scores the student's ids: use a teacher of the same tokenizer")  # fmt: skip
        if getattr(self.args, "apply_chat_template", False):
            messages = [{"role": "user", "content": "12+34?"}]
            ours, theirs = (_template_ids(t, messages) for t in (self.tokenizer, other))
            same = ours == theirs
            self.add(f"{name}: chat template", True if same else None,
                     "equal" if same else "differs; the student's is used for both")  # fmt: skip

    def _context(self, name: str, info: dict) -> None:
        needed = getattr(self.args, "rollout_max_context_len", None)
        limit = info.get("context_length") or info.get("max_req_input_len")
        if not needed or not limit:
            self.add(f"{name}: context length", None, f"server {limit or 'its model limit'}, run {needed or 'its model limit'}")
            return
        self.add(f"{name}: context length", limit > needed, f"server {limit}, run {needed}",
                 f"start it with --context-length of at least {needed + CONTEXT_SLACK}")  # fmt: skip


def _template_ids(tokenizer, messages) -> list[int] | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
