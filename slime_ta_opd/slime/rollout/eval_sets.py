"""Evaluation sets of a run by name, each with sampling parameters and an answer check of its own where --eval-config gives them.

    eval:
      defaults: {temperature: 0.6, max_response_len: 4096}
      datasets:
        - {name: math500, path: math500.jsonl, rm_type: math, n_samples_per_eval_prompt: 4}
        - {name: gsm8k, path: gsm8k.parquet, rm_type: last_number, temperature: 0}

What neither a set nor `defaults` says is that of the flags (--eval-temperature, --rm-type, ...).
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

import yaml

from slime.rollout.rm_hub import get_checker
from ta_opd.errors import ConfigError

# key of the file -> (attribute of the run's arguments, its type, smallest value)
KEYS: dict[str, tuple[str, type, float | None]] = {
    "temperature": ("eval_temperature", float, 0),
    "top_p": ("eval_top_p", float, 0),
    "top_k": ("eval_top_k", int, -1),
    "max_response_len": ("eval_max_response_len", int, 1),
    "n_samples_per_eval_prompt": ("n_samples_per_eval_prompt", int, 1),
    "rm_type": ("rm_type", str, None),
    "input_key": ("eval_input_key", str, None),
    "label_key": ("eval_label_key", str, None),
    "stop_token_ids": ("rollout_stop_token_ids", list, None),
}


def read_eval_sets(args) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """({name: file}, {name: {attribute: value}}) of --eval-prompt-data and --eval-config. ConfigError for anything unclear."""
    pairs = args.eval_prompt_data or []
    if len(pairs) % 2:
        raise ConfigError(f"--eval-prompt-data: expected pairs of NAME FILE, got {len(pairs)} words: {' '.join(pairs)}")
    files = dict(zip(pairs[::2], pairs[1::2], strict=True))
    settings: dict[str, dict[str, Any]] = {}
    if getattr(args, "eval_config", None):
        for name, file, values in _sets(args.eval_config):
            if name in files:
                raise ConfigError(f"--eval-config {args.eval_config}: the set {name!r} is given twice; names must differ")
            files[name], settings[name] = file, values
    for name in files:
        get_checker(args_of(args, name, settings).rm_type)
    return files, settings


def args_of(args, name: str, settings: dict[str, dict[str, Any]] | None = None) -> argparse.Namespace:
    """The run's arguments as they are for the evaluation set `name`."""
    settings = args.eval_settings if settings is None else settings
    return argparse.Namespace(**{**vars(args), **settings.get(name, {})})


def _sets(path: str) -> list[tuple[str, str, dict[str, Any]]]:
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--eval-config: expected a YAML file, got {path!r}, which does not exist")
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"--eval-config {path}: not valid YAML: {error}") from None
    content = content.get("eval", content) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), list) or not content["datasets"]:
        raise ConfigError(f"--eval-config {path}: expected `eval:` with a list `datasets:`, each with name and path")
    defaults = _values(path, "defaults", content.get("defaults") or {})
    found = []
    for number, item in enumerate(content["datasets"], 1):
        where = f"datasets[{number}]"
        if not isinstance(item, dict) or not item.get("name") or not item.get("path"):
            raise ConfigError(f"--eval-config {path}: {where}: expected name and path, got {item!r}")
        own = {key: value for key, value in item.items() if key not in ("name", "path")}
        found.append((str(item["name"]), str(item["path"]), defaults | _values(path, where, own)))
    return found


def _values(path: str, where: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ConfigError(f"--eval-config {path}: {where}: expected keys and values, got {given!r}")
    out = {}
    for key, value in given.items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"--eval-config {path}: {where}: unknown key {key!r}{hint} Known: name, path, {', '.join(KEYS)}")
        attribute, kind, least = KEYS[key]
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if not fits or (least is not None and value < least):
            raise ConfigError(f"--eval-config {path}: {where}: {key}: expected {kind.__name__}"
                              f"{'' if least is None else f' of at least {least:g}'}, got {value!r}")  # fmt: skip
        out[attribute] = kind(value)
    return out
