"""What a run must not silently change when it resumes: its teachers and its tokenizer.

A directory is identified by content (config, file sizes, tokenizer bytes), so that moving it changes nothing. A teacher that is known
only by the addresses of its servers cannot be read; it is identified by those addresses.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from ta_opd.errors import ConfigError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def run_identity(args: argparse.Namespace) -> dict[str, str]:
    """{"tokenizer": digest, "teacher:<name>": digest of a directory, or "at URL ..." with the sorted addresses of its servers}."""
    identity = {}
    if student := getattr(args, "hf_checkpoint", None):
        identity["tokenizer"] = _tokenizer(Path(student))
    teachers = dict(getattr(args, "teachers", None) or {})
    if load := getattr(args, "opd_teacher_load", None):
        teachers["megatron"] = load
    elif not teachers and (model := getattr(args, "teacher_model", None)):
        teachers["default"] = model
    for name, source in teachers.items():
        if isinstance(source, str) and Path(source).is_dir():
            identity[f"teacher:{name}"] = _model(Path(source))
        elif urls := sorted(url.rstrip("/") for url in ([source] if isinstance(source, str) else source) if "://" in url):
            identity[f"teacher:{name}"] = " ".join(["at", *urls])
    return identity


def check_identity(saved: dict[str, str], current: dict[str, str], *, allow: bool, where: str) -> list[str]:
    """Names that differ between a checkpoint and this run. Raises ConfigError for any unless `allow`."""
    changed = [name for name in saved if name in current and saved[name] != current[name]]
    changed += [n for n in current if n.startswith("teacher:") and n not in saved and any(s.startswith("teacher:") for s in saved)]
    if changed and not allow:
        raise ConfigError(
            f"{where}: the checkpoint was trained with another {', '.join(_change(n, saved, current) for n in changed)}; "
            "expected the same on resume. Give the old one back, or pass --allow-teacher-change to go on and have the change recorded"
        )
    return changed


def forced_change(rollout_id: int, changed: list[str], saved: dict[str, str], current: dict[str, str]) -> dict:
    """What --allow-teacher-change let through, as it is kept in checkpoints and identity_changes.jsonl: from which rollout on,
    and for each changed name the identity before and after (None: there was none)."""
    return {"from_rollout": rollout_id, "changed": {name: [saved.get(name), current.get(name)] for name in changed}}


def _change(name: str, saved: dict[str, str], current: dict[str, str]) -> str:
    """The name, with both addresses where a teacher is known by them (digests tell a reader nothing)."""
    both = [side.get(name, "absent") for side in (saved, current)]
    if not any(text.startswith("at ") for text in both):
        return name
    return f"{name} ({' -> '.join(text if text.startswith('at ') else 'a directory' for text in both)})"


def _tokenizer(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (directory / name).is_file():
            digest.update(name.encode() + (directory / name).read_bytes())
    return digest.hexdigest()[:16]


def _model(directory: Path) -> str:
    """Digest of the config and of the weight files' names and sizes (not their content: teachers are large)."""
    digest = hashlib.sha256()
    if (directory / "config.json").is_file():
        digest.update((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")) or sorted(directory.rglob("*.distcp")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
    return digest.hexdigest()[:16]
