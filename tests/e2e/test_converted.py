"""A model that went through both converters is served by SGLang with the log-probs that transformers gives the original."""

import importlib.util
import json
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.e2e
TOOLS = Path(__file__).parents[2] / "tools"


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def served_logprobs(url: str, ids: list[int]) -> np.ndarray:
    """Log-prob of each token but the first, as the server scores the sequence."""
    body = {"input_ids": ids, "return_logprob": True, "logprob_start_len": 0, "sampling_params": {"max_new_tokens": 1, "temperature": 1.0}}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return np.array([entry[0] for entry in json.load(reply)["meta_info"]["input_token_logprobs"][1:]])


def test_sglang_serves_a_converted_model(task, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slime.backends.sglang_utils.server import SGLangServer
    from slime.backends.sglang_utils.server_flags import server_arguments
    from tests.helpers.models import write_tiny_qwen3

    origin, out = tmp_path / "origin", tmp_path / "out"
    write_tiny_qwen3(origin, task.student, seed=7, layers=3, tied=False)
    pad = ["--make-vocab-size-divisible-by", "96"]
    assert tool("convert_hf_to_torch_dist").main(["--hf-checkpoint", str(origin), "--save", str(tmp_path / "dist"), *pad]) == 0
    to_hf = ["--checkpoint-root", str(tmp_path / "dist"), "--origin-hf-dir", str(origin), "--output-dir", str(out), "--chunk-size", "100000"]
    assert tool("convert_megatron_checkpoint_to_hf").main(to_hf) == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, len(AutoTokenizer.from_pretrained(origin)), n).tolist() for n in (3, 40)]
    args = SimpleNamespace(device="cpu", rollout_max_context_len=256, rollout_seed=42)
    server = SGLangServer(out, "teacher", log_file=tmp_path / "server.log", extra_args=server_arguments(args, "teacher", str(out)), device="cpu")
    with server:
        server.wait_ready(300)
        for ids in prompts:
            with torch.no_grad():
                expected = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            np.testing.assert_allclose(served_logprobs(server.url, ids), expected.numpy(), atol=2e-4)
