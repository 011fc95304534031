"""Prompts of a run: read and checked once, handed out in groups of samples, shuffled anew each epoch, resumable."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
from tqdm import tqdm

from slime.rollout.prompt_file import PromptRow, read_prompt_file
from slime.rollout.sample_state import sample_from_state, sample_to_state
from slime.rollout.sampling import shared_ids
from slime.utils.types import Sample
from ta_opd.errors import ConfigError, DataError

logger = logging.getLogger(__name__)
_CHUNK = 2000


class PromptDataSource:
    """The prompts of `path` (default args.prompt_data) as groups of n samples of one prompt.

    Building it reads, formats and tokenizes every prompt and checks all of them (DataError names file and line). With
    `evaluation` the eval flags rule (keys, samples a prompt, response length) and the order is the file's.
    """

    def __init__(self, args, tokenizer, path: str | None = None, evaluation: bool = False):
        self.args, self.tokenizer, self.evaluation = args, tokenizer, evaluation
        self.path = path or args.prompt_data
        input_key, label_key = args.input_key, args.label_key
        if evaluation:
            input_key = getattr(args, "eval_input_key", None) or input_key
            label_key = getattr(args, "eval_label_key", None) or label_key
        teachers = () if evaluation else tuple(getattr(args, "teachers", None) or ())
        self.rows, self.fingerprint = read_prompt_file(
            self.path,
            input_key=input_key,
            label_key=label_key,
            metadata_key=getattr(args, "metadata_key", None),
            teacher_key=getattr(args, "teacher_key", "teacher"),
            teachers=teachers,
        )
        self.prompt_ids = self._tokenize()
        self.skipped = 0  # prompts left out by --skip-long-prompts
        self._check_lengths()
        self.n_samples = args.n_samples_per_eval_prompt if evaluation else args.n_samples_per_prompt
        self.shuffle = bool(getattr(args, "rollout_shuffle", False)) and not evaluation
        self.epoch, self.position = 0, 0
        self.next_group, self.next_index = 0, 0
        self.buffer: deque[list[Sample]] = deque()
        self._order = self._permutation(0)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def max_response_len(self) -> int:
        own = getattr(self.args, "eval_max_response_len", None) if self.evaluation else None
        return own or self.args.rollout_max_response_len

    def get_samples(self, n: int) -> list[list[Sample]]:
        """The next n groups of samples: unfinished groups given back first, then new prompts, over epochs without end."""
        groups = [self.buffer.popleft() for _ in range(min(n, len(self.buffer)))]
        while len(groups) < n:
            if self.position == len(self.rows):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._permutation(self.epoch)
            groups.append(self._group(int(self._order[self.position])))
            self.position += 1
        return groups

    def all_samples(self) -> list[list[Sample]]:
        """Every prompt once, in the file's order, numbered from 0 each time (for evaluation)."""
        self.next_group = self.next_index = 0
        return [self._group(i) for i in range(len(self.rows))]

    def add_samples(self, groups: Iterable[list[Sample]]) -> None:
        """Takes unfinished groups back; the next call of `get_samples` hands them out first."""
        self.buffer.extend(groups)

    def state_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and bytes: what `load_state_dict` needs to go on with the very next prompt."""
        return {
            "path": str(self.path),
            "fingerprint": self.fingerprint,
            "num_prompts": len(self.rows),
            "seed": self.args.rollout_seed,
            "shuffle": self.shuffle,
            "epoch": self.epoch,
            "position": self.position,
            "next_group": self.next_group,
            "next_index": self.next_index,
            "buffer": [[sample_to_state(s) for s in group] for group in self.buffer],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. Raises DataError when the prompt file has fewer prompts than were used."""
        if state["fingerprint"] != self.fingerprint:
            self._check_place(state)
            logger.warning("resume: %s differs from the prompts of the checkpoint; the order of prompts changes", self.path)
        elif state["num_prompts"] != len(self.rows):
            logger.warning("resume: %s prompts were used, now %s fit; the order of prompts changes", state["num_prompts"], len(self.rows))
            self._check_place(state)
        for key, now in (("seed", self.args.rollout_seed), ("shuffle", self.shuffle)):
            if state[key] != now:
                logger.warning("resume: rollout %s was %s, is %s; the order of prompts changes", key, state[key], now)
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self.next_group, self.next_index = int(state["next_group"]), int(state["next_index"])
        self._order = self._permutation(self.epoch)
        self.buffer = deque([sample_from_state(s) for s in group] for group in state["buffer"])

    def _check_place(self, state: dict[str, Any]) -> None:
        if state["position"] > len(self.rows):
            raise DataError(
                f"resume: {state['path']} had {state['num_prompts']} prompts and {state['position']} of them were used, "
                f"{self.path} has {len(self.rows)}; give the same file or start a new run"
            )

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.rows))
        return np.random.default_rng([self.args.rollout_seed, epoch]).permutation(len(self.rows))

    def _group(self, row: int) -> list[Sample]:
        source, ids = self.rows[row], self.prompt_ids[row]
        group = []
        for _ in range(self.n_samples):
            sample = Sample(
                group_index=self.next_group,
                index=self.next_index,
                prompt=source.prompt,
                tokens=shared_ids(ids.tolist()),
                label=source.label,
                metadata={**source.metadata, "prompt_row": row},
            )
            self.next_index += 1
            group.append(sample)
        self.next_group += 1
        return group

    def _tokenize(self) -> list[np.ndarray]:
        ids: list[np.ndarray] = []
        chunks = range(0, len(self.rows), _CHUNK)
        for begin in tqdm(chunks, desc="tokenizing prompts", unit_scale=_CHUNK, delay=2, leave=False):
            part = self.rows[begin : begin + _CHUNK]
            texts = [self._text(row) for row in part]
            ids += [np.array(i, np.int32) for i in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        return ids

    def _text(self, row: PromptRow) -> str:
        if not self.args.apply_chat_template:
            if isinstance(row.prompt, str):
                return row.prompt
            raise ConfigError(f"{row.where}: the prompt is a list of chat messages; pass --apply-chat-template to format it")
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(f"--apply-chat-template: the tokenizer of the student has no chat template ({self.args.hf_checkpoint}); "
                              "give it one (chat_template.jinja, or chat_template in tokenizer_config.json), or use prompts of plain text without the flag")  # fmt: skip
        messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        extra = getattr(self.args, "apply_chat_template_kwargs", None) or {}
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **extra)
        except Exception as error:  # the template is code of the model directory and may raise anything
            raise DataError(f"{row.where}: the chat template refuses this prompt: {error}") from error

    def _check_lengths(self) -> None:
        config = getattr(self.args, "student_config", None) or {}
        vocabulary = config.get("vocab_size")
        context = getattr(self.args, "rollout_max_context_len", None)
        limits = []
        if getattr(self.args, "rollout_max_prompt_len", None):
            limits.append((self.args.rollout_max_prompt_len, "--rollout-max-prompt-len", "raise it, shorten the prompts, or leave those out with --skip-long-prompts"))
        if context:
            room = f"--rollout-max-context-len {context} minus a response of {self.max_response_len}"
            limits.append((context - self.max_response_len, room, "lower the response length, shorten the prompts, or leave those out with --skip-long-prompts"))
        if limits and getattr(self.args, "skip_long_prompts", False) and not self.evaluation:
            self._skip_long(min(limits)[0])
        for row, ids in zip(self.rows, self.prompt_ids, strict=True):
            if len(ids) == 0:
                raise DataError(f"{row.where}: the prompt has no tokens")
            if vocabulary and int(ids.max()) >= vocabulary:
                raise DataError(
                    f"{row.where}: token id {int(ids.max())} is outside the student's vocabulary of {vocabulary}; "
                    "tokenizer and model do not belong together"
                )
            for limit, name, advice in limits:
                if len(ids) > limit:
                    count = sum(len(i) > limit for i in self.prompt_ids)
                    raise DataError(
                        f"{row.where}: the prompt has {len(ids)} tokens, at most {limit} fit ({name}); {count} of "
                        f"{len(self.rows)} prompts are too long: {advice}"
                    )

    def _skip_long(self, limit: int) -> None:
        """Leaves out prompts of more than `limit` tokens. Raises DataError where none would be left."""
        fits = [len(ids) <= limit for ids in self.prompt_ids]
        if not any(fits):
            raise DataError(f"prompt file {self.path}: expected prompts of at most {limit} tokens, got {len(fits)} longer ones; lower the response length")
        self.skipped = len(fits) - sum(fits)
        self.rows = [row for row, fit in zip(self.rows, fits, strict=True) if fit]
        self.prompt_ids = [ids for ids, fit in zip(self.prompt_ids, fits, strict=True) if fit]
