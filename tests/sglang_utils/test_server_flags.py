"""Start arguments of servers: what a teacher gets that a student does not."""

from types import SimpleNamespace

import pytest

from slime.backends.sglang_utils.server_flags import server_arguments


def arguments(role, device="cuda", **values):
    words = server_arguments(SimpleNamespace(device=device, **values), role, "/nowhere")
    return {flag: words[i + 1] for i, flag in enumerate(words[:-1]) if flag.startswith("--")}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_samples_of_a_prompt_are_scored_after_the_first_of_them(device):
    assert arguments("teacher", device)["--schedule-policy"] == "lpm"
    assert "--schedule-policy" not in arguments("student", device)


def test_only_the_teacher_is_quantized():
    values = {"teacher_quantization": "fp8", "sglang_dtype": "bfloat16"}
    assert arguments("teacher", **values)["--quantization"] == "fp8"
    assert "--quantization" not in arguments("student", **values) and "--quantization" not in arguments("teacher")


def test_passthrough_wins_by_coming_last():
    words = server_arguments(SimpleNamespace(device="cuda", sglang_passthrough=["--schedule-policy", "fcfs"]), "teacher", "/nowhere")
    assert words[-2:] == ["--schedule-policy", "fcfs"] and "lpm" in words[:-2]
