"""Flags from a YAML file: flag names as keys, the command line wins, an unknown key is refused with the nearest name."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ta_opd.errors import ConfigError

SECRETS = ("sglang_api_key",)
_SECRET_ENDS = ("-api-key", "-password")  # of SGLang's own flags
_ADDRESSES = ("rm_url", "teacher", "rollout_external_engine_addrs")


def json_value(text: str) -> Any:
    """argparse type: a JSON value."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"expected JSON, got {text!r}: {error}") from None


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses argv; values of --config and then --custom-config-path replace defaults, never given flags."""
    head = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    head.add_argument("--config")
    head.add_argument("--custom-config-path")
    paths, _ = head.parse_known_args(argv)
    for path in (paths.config, paths.custom_config_path):
        if path:
            parser.set_defaults(**load(parser, path))
    args, unknown = parser.parse_known_args(argv)
    args.sglang_passthrough = args.sglang_passthrough + _sglang_passthrough(parser, unknown)
    args.flag_names = sorted(a.dest for a in parser._actions if a.option_strings and a.dest != "help")
    _refuse_secrets(args)
    return args


def _refuse_secrets(args: argparse.Namespace) -> None:
    """ConfigError for secrets where they would be seen: in addresses, which are logged and saved, and among the servers' own arguments."""
    advice = "it would stand in logs, the saved configuration and process lists; for the servers' key use SLIME_SGLANG_API_KEY"
    for name in _ADDRESSES:
        for address in getattr(args, name, None) or []:
            if "@" in address.partition("://")[2].partition("/")[0]:
                raise ConfigError(f"--{name.replace('_', '-')}: expected an address without user and password, got one with them; {advice}")
    for word in args.sglang_passthrough:
        if word.startswith("--") and word.split("=")[0].endswith(_SECRET_ENDS):
            raise ConfigError(f"--sglang-{word.split('=')[0].removeprefix('--')}: a secret is not handed on; {advice}")


def load(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """One YAML file as {attribute: value}, checked and converted by the parser's own actions."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--config: expected a YAML file, got {path!r}, which does not exist")
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected flag names as keys, got a {type(content).__name__}")
    actions = {a.dest: a for a in parser._actions if a.option_strings}
    values = {}
    for key, value in content.items():
        dest = str(key).lstrip("-").replace("-", "_")
        if dest not in actions:
            near = difflib.get_close_matches(dest, actions, n=1)
            hint = f"; did you mean {near[0].replace('_', '-')!r}?" if near else ""
            raise ConfigError(f"--config {path}: unknown key {key!r}{hint}")
        values[dest] = _convert(actions[dest], key, value, path)
    return values


def _convert(action: argparse.Action, key: str, value: Any, path: str) -> Any:
    if value is None:
        return None
    if isinstance(action, (argparse._StoreTrueAction, argparse.BooleanOptionalAction)):
        if not isinstance(value, bool):
            raise ConfigError(f"--config {path}: {key}: expected true or false, got {value!r}")
        return value
    if action.nargs in ("+", "*", argparse.REMAINDER) or isinstance(action, argparse._AppendAction):
        items = value if isinstance(value, list) else [value]
        return [_one(action, key, item, path) for item in items]
    return _one(action, key, value, path)


def _one(action: argparse.Action, key: str, value: Any, path: str) -> Any:
    if action.type is json_value and not isinstance(value, str):
        return value
    try:
        converted = action.type(str(value)) if action.type else str(value)
    except (ValueError, argparse.ArgumentTypeError):
        raise ConfigError(f"--config {path}: {key}: expected {action.type.__name__}, got {value!r}") from None
    if action.choices and converted not in action.choices:
        raise ConfigError(f"--config {path}: {key}: expected one of {', '.join(action.choices)}, got {value!r}")
    return converted


def _sglang_passthrough(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> list[str]:
    """`--sglang-foo VALUE` that is no flag of ours -> `--foo VALUE` for the servers; anything else is refused."""
    out, inside = [], False
    for word in unknown:
        if word.startswith("--sglang-"):
            out.append("--" + word.removeprefix("--sglang-"))
            inside = True
        elif inside and not word.startswith("--"):
            out.append(word)
        else:
            known = [s for a in parser._actions for s in a.option_strings]
            near = difflib.get_close_matches(word.split("=")[0], known, n=1)
            raise ConfigError(f"unknown flag {word!r}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    return out


def resolved(args: argparse.Namespace) -> dict[str, Any]:
    """The resolved flags as plain data, without secrets: config.yaml, --dry-run, checkpoints. --config takes it again."""
    return {k: getattr(args, k) for k in args.flag_names if k != "config" and k not in SECRETS}


def dump(args: argparse.Namespace, path: str | Path) -> None:
    """Writes the resolved configuration as YAML (whole file or nothing)."""
    target = Path(path)
    partial = target.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(resolved(args), sort_keys=True))
    partial.replace(target)
