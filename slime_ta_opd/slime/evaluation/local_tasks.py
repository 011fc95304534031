"""Harness tasks on local files, for machines without a network: a known task on a local copy of its data, or a prompt file of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ta_opd.errors import ConfigError

SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
LAST_NUMBER = r"(-?[0-9][0-9,]*(?:\.[0-9]+)?)"


def _known_yaml(task: str) -> Path:
    """The harness's own file of a task. Raises ConfigError for an unknown task or a group."""
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    entry = index.get(task)
    path = getattr(entry, "yaml_path", None)
    if path is None:
        raise ConfigError(f"LOCAL_DATASETS: expected the name of a harness task, got {task!r} (lm-eval ls tasks lists them)")
    content = _load(Path(path))
    if "group" in content:
        raise ConfigError(f"LOCAL_DATASETS: {task!r} is a group; name its tasks {content.get('task')} instead, or use HF_HOME and OFFLINE=1")
    return Path(path)


def _load(path: Path) -> dict[str, Any]:
    """A task file with what it includes; `!function` values stay opaque."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!function", lambda loader, suffix, node: f"!function {node.value}")
    content = yaml.load(path.read_text(), Loader)
    if parent := content.pop("include", None):
        content = _load((path.parent / parent).resolve()) | content
    return content


def local_copy(task: str, data: str, find: Callable[[str], Path] = _known_yaml) -> tuple[str, dict[str, Any]]:
    """(name, task description) of `task` read from `data`: a JSONL or parquet file (used for every split of the task), or a directory
    that `datasets.load_dataset` can read. Raises ConfigError when either is missing."""
    source = find(task)
    path = Path(data)
    description: dict[str, Any] = {"include": str(source), "task": f"{task}_local"}
    if path.is_dir():
        return description["task"], description | {"dataset_path": str(path.resolve())}
    if not path.is_file():
        raise ConfigError(f"LOCAL_DATASETS: {task}={data}: expected a data directory or a JSONL or parquet file, which does not exist")
    splits = {v for k, v in _load(source).items() if k in SPLIT_KEYS and v}
    return description["task"], description | {
        "dataset_path": "parquet" if path.suffix == ".parquet" else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": dict.fromkeys(sorted(splits) or ["test"], str(path.resolve()))},
    }


def prompt_task(name: str, data: str, input_key: str, label_key: str) -> tuple[str, dict[str, Any]]:
    """(name, task description) for a prompt file of ours: the last number of the response must equal the label."""
    path = Path(data)
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ConfigError(f"PROMPT_TASKS: expected letters, digits and underscore as name, got {name!r}")
    if not path.is_file():
        raise ConfigError(f"PROMPT_TASKS: {name}={data}: expected a JSONL or parquet file, which does not exist")
    return name, {
        "task": name,
        "dataset_path": "parquet" if path.suffix == ".parquet" else "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{" + input_key + "}}",
        "doc_to_target": "{{" + label_key + "}}",
        "generation_kwargs": {"until": [], "do_sample": False},
        "filter_list": [
            {"name": "last-number", "filter": [
                {"function": "regex", "regex_pattern": LAST_NUMBER, "group_select": -1}, {"function": "take_first"},
            ]},
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": [","]}],
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }  # fmt: skip


def write(directory: Path, local: Mapping[str, str], prompts: Mapping[str, str], input_key: str, label_key: str,
          find: Callable[[str], Path] = _known_yaml) -> dict[str, str]:  # fmt: skip
    """Writes the task files and returns {name the user gave: name the harness is asked for}."""
    tasks = {task: local_copy(task, data, find) for task, data in local.items()}
    tasks |= {name: prompt_task(name, data, input_key, label_key) for name, data in prompts.items()}
    if tasks:
        directory.mkdir(parents=True, exist_ok=True)
    for name, description in tasks.values():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(description, sort_keys=False))
    return {given: name for given, (name, _) in tasks.items()}
