"""Flags and their YAML form: what wins, what is refused, what is passed on."""

import pytest

from slime.utils import config_file
from slime.utils.arguments import build_parser, parse_args
from ta_opd.errors import ConfigError
from ta_opd.selection import _ARGUMENT, PROFILE_DEFAULTS, SelectionConfig


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


def test_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = write(tmp_path, "lr: 3e-4\nnum-rollout: 7\nrollout_shuffle: true\nrm-url: [http://a/generate]\n")
    args = parse_args(["--config", path, "--num-rollout", "9"])
    assert (args.lr, args.num_rollout, args.rollout_shuffle, args.rm_url) == (3e-4, 9, True, ["http://a/generate"])
    assert args.weight_decay == 0.1


def test_unknown_key_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'opd-budget-ration'; did you mean 'opd-budget-ratio'"):
        parse_args(["--config", write(tmp_path, "opd-budget-ration: 0.1")])


@pytest.mark.parametrize(("text", "message"), [
    ("num_rollout: many", "expected int, got 'many'"),
    ("rollout_shuffle: maybe", "expected true or false"),
    ("opd_profile: both", "expected one of paper, released"),
    ("- 1", "expected flag names as keys"),
    ("a: [", "not valid YAML"),
])  # fmt: skip
def test_bad_values_in_the_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        parse_args(["--config", write(tmp_path, text)])


def test_yaml_cannot_run_code(tmp_path):
    target = tmp_path / "touched"
    with pytest.raises(ConfigError):
        parse_args(["--config", write(tmp_path, f"lr: !!python/object/apply:os.system ['touch {target}']")])
    assert not target.exists()


def test_unknown_flags_are_refused_but_sglang_flags_pass_through():
    args = parse_args(["--sglang-attention-backend", "triton", "--sglang-disable-radix-cache", "--lr", "1"])
    assert args.sglang_passthrough == ["--attention-backend", "triton", "--disable-radix-cache"]
    with pytest.raises(ConfigError, match="unknown flag '--opd-budget-ration'; did you mean --opd-budget-ratio"):
        parse_args(["--opd-budget-ration", "0.1"])


def test_a_released_command_line_is_accepted():
    words = """--qkv-format bshd --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 --attention-backend flash
    --no-rope-fusion --transformer-impl local --no-masked-softmax-fusion --megatron-to-hf-mode raw --use-kl-loss
    --kl-loss-coef 0.00 --kl-loss-type low_var_kl --num-layers 28 --swiglu --norm-epsilon 1e-6 --rotary-base 1000000
    --custom-rm-path slime.rollout.on_policy_distillation.reward_func --balance-data --use-opd --opd-type sglang"""
    args = parse_args(words.split())
    assert args.num_layers == 28 and args.opd_type == "sglang"


@pytest.mark.parametrize("name", [n for n, value in PROFILE_DEFAULTS["paper"].items() if value != PROFILE_DEFAULTS["released"][n]])
def test_each_choice_of_a_profile_is_a_flag_of_its_own_and_the_flag_wins(name):
    for profile, other in (("paper", "released"), ("released", "paper")):
        flag, value = "--" + _ARGUMENT[name].replace("_", "-"), PROFILE_DEFAULTS[other][name]
        config = SelectionConfig.from_args(parse_args(["--opd-profile", profile, flag, value]))
        got = {field: getattr(config, field) for field in PROFILE_DEFAULTS[profile]}
        assert got == {**PROFILE_DEFAULTS[profile], name: value}


def test_secrets_stay_out_of_the_saved_configuration(tmp_path):
    args = parse_args(["--sglang-api-key", "hunter2"])
    config_file.dump(args, tmp_path / "config.yaml")
    assert "hunter2" not in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("words", [["--rm-url", "http://me:hunter2@host:1/generate"], ["--teacher", "a=https://hunter2@host"],
                                   ["--rollout-external-engine-addrs", "http://host:1", "http://u:hunter2@host:2"],
                                   ["--sglang-admin-api-key", "hunter2"], ["--sglang-ssl-keyfile-password=hunter2"]])  # fmt: skip
def test_a_secret_in_a_place_that_is_seen_is_refused_and_not_repeated(words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        parse_args(words)
    assert "SLIME_SGLANG_API_KEY" in str(caught.value) and "hunter2" not in str(caught.value)
    if words[0] == "--rm-url":
        (tmp_path / "run.yaml").write_text(f"rm_url: [{words[1]!r}]\n")
        with pytest.raises(ConfigError, match="without user and password"):
            parse_args(["--config", str(tmp_path / "run.yaml")])
    parse_args(["--rm-url", "http://host:1/generate?path=a@b", "--sglang-skip-tokenizer-init", "--sglang-api-key", "x"])


def test_the_file_takes_what_the_run_saved(tmp_path):
    first = parse_args(["--lr", "0.5", "--teacher", "a=http://x", "--eval-prompt-data", "m", "f.jsonl"])
    config_file.dump(first, tmp_path / "config.yaml")
    again = parse_args(["--config", str(tmp_path / "config.yaml")])
    assert (again.lr, again.teacher, again.eval_prompt_data) == (0.5, ["a=http://x"], ["m", "f.jsonl"])


def test_every_flag_has_help():
    for action in build_parser()._actions:
        assert action.help, action.option_strings
