"""The opd_* options of a stock slime checkout, where no argument parser knows them: defaults and checks.

They come as attributes of slime's `args`, set by slime from the YAML file of `--custom-config-path` (or by a parser, in a
checkout whose arguments.py was extended). What is missing has the default below.
"""

import difflib
from types import SimpleNamespace
from typing import Any

import numpy as np

from ta_opd.errors import ConfigError
from ta_opd.metrics import SUPPORTS
from ta_opd.scores import is_number
from ta_opd.selection import SelectionConfig
from ta_opd.token_bank.files import FORMATS

DEFAULTS: dict[str, Any] = {
    # what is measured
    "opd_topk_metrics_k": 0,
    "opd_exact_cmass": False,
    "opd_exact_cmass_max_union": 4096,
    "opd_exact_cmass_overflow": "fallback",
    "opd_exact_cmass_window": None,
    "opd_divergence_support": None,
    "opd_compat_prefix_ema_alpha": 0.9,
    # what is kept (None: the profile's value, see ta_opd.selection.SelectionConfig)
    "opd_profile": "paper",
    "opd_budget_mask": "none",
    "opd_budget_ratio": 1.0,
    "opd_budget_gamma": 0.5,
    "opd_budget_mask_seed": 42,
    "opd_budget_min_keep_per_sample": 1,
    "opd_budget_min_keep_rule": None,
    "opd_budget_scope": None,
    "opd_compat_proxy": "mass",
    "opd_metric_normalization": None,
    "opd_metric_q_low": None,
    "opd_metric_q_high": None,
    "opd_metric_population": None,
    "opd_softor_source": None,
    "opd_quadrant_cut": None,
    "opd_budget_rounding": None,
    "opd_budget_min_keep_score": None,
    "opd_budget_low_ties": None,
    "opd_budget_random_source": None,
    "opd_budget_reported_score": None,
    "opd_selector_path": None,
    # where it is written
    "opd_token_bank_dir": None,
    "opd_token_bank_format": "parquet",
    "opd_token_bank_raw_topk": False,
    "opd_token_bank_pair_id": "",
    "opd_teacher_name": None,
    "opd_student_name": None,
    # how the teacher is asked
    "request_timeout": 600.0,
    "request_retries": 5,
    "teacher_concurrency": 64,
}
OURS = ("opd_budget_", "opd_metric_", "opd_token_bank_", "opd_exact_cmass")  # names that a later slime will hardly use
OVERFLOWS = ("fallback", "truncate", "error")
NO_SELECTION = ("none", "full")


def selects(config: SelectionConfig) -> bool:
    """Whether `config` leaves out any token at all: false for the masks none and full."""
    return config.selector_path is not None or config.mask not in NO_SELECTION


def reply_dtype(options: Any) -> type:
    """What replies are parsed to: float64 for profile released (its arithmetic, to the last bit), else float32, as servers compute."""
    return np.float64 if options.opd_profile == "released" else np.float32


def resolve(args: Any) -> SimpleNamespace:
    """All attributes of `args`, with DEFAULTS for missing or None ones. `args` itself is not changed.

    Raises ConfigError on values out of range.
    """
    given = dict(vars(args))
    options = {**given, **{name: value for name, value in DEFAULTS.items() if given.get(name) is None}}
    resolved = SimpleNamespace(**options)
    _check(resolved)
    return resolved


def _check(options: SimpleNamespace) -> None:
    config = SelectionConfig.from_args(options)
    k = options.opd_topk_metrics_k
    if not isinstance(k, int) or k < 0:
        raise ConfigError(f"opd_topk_metrics_k: expected a whole number >= 0 (16 is usual), got {k!r}")
    for name, needed in (
        (f"opd_budget_mask {config.mask}", selects(config)),
        ("opd_exact_cmass", options.opd_exact_cmass),
    ):
        if needed and k == 0:
            raise ConfigError(f"{name} needs top-k: expected opd_topk_metrics_k of 1 or more (16 is usual), got 0")
    if not isinstance(options.opd_exact_cmass_max_union, int) or options.opd_exact_cmass_max_union < 1:
        raise ConfigError(f"opd_exact_cmass_max_union: expected a whole number, 1 or more, got {options.opd_exact_cmass_max_union!r}")
    if options.opd_exact_cmass_overflow not in OVERFLOWS:
        raise ConfigError(f"opd_exact_cmass_overflow: expected one of {OVERFLOWS}, got {options.opd_exact_cmass_overflow!r}")
    if options.opd_token_bank_format not in FORMATS:
        raise ConfigError(f"opd_token_bank_format: expected one of {FORMATS}, got {options.opd_token_bank_format!r}")
    if options.opd_divergence_support is not None and options.opd_divergence_support not in SUPPORTS:
        raise ConfigError(f"opd_divergence_support: expected one of {SUPPORTS}, got {options.opd_divergence_support!r}")
    if not is_number(options.opd_compat_prefix_ema_alpha) or not 0 <= options.opd_compat_prefix_ema_alpha <= 1:
        raise ConfigError(f"opd_compat_prefix_ema_alpha: expected a number in [0, 1], got {options.opd_compat_prefix_ema_alpha!r}")


def check_training(args: Any) -> None:
    """Checks of a run in a stock checkout: distillation is on, its teacher is a server, no option is misspelt.

    Raises ConfigError.
    """
    known = [*DEFAULTS, "opd_type", "opd_kl_coef", "opd_teacher_load", "opd_teacher_ckpt_step"]
    for name in vars(args):
        if not name.startswith("opd_") or name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6 if name.startswith(OURS) else 0.9)
        if near or name.startswith(OURS):
            raise ConfigError(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if not getattr(args, "use_opd", True):
        raise ConfigError("the opd_* options do nothing without distillation: pass --use-opd --opd-type sglang")
    if getattr(args, "opd_type", "sglang") != "sglang":
        raise ConfigError(f"token selection needs --opd-type sglang, got {args.opd_type!r}: a Megatron teacher gives no top-k")
    if getattr(args, "opd_divergence_support", None) == "exact":
        raise ConfigError("opd_divergence_support: expected union_floor or union_tail, got 'exact'; a server returns top-k lists, not the whole vocabulary")
    temperature = getattr(args, "rollout_temperature", 1.0)
    if temperature != 1.0 and getattr(args, "opd_topk_metrics_k", 0):
        raise ConfigError(
            f"rollout_temperature: expected 1.0, got {temperature}: the teacher's scores are always at temperature 1, "
            "so student and teacher would not be comparable"
        )
