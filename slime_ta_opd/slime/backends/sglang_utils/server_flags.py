"""Start arguments of student and teacher servers on CPU and GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

# Room beyond the longest sequence: a scoring request must be shorter than the context by at least one token.
CONTEXT_SLACK = 8
_CPU_CACHE_BYTES = 2**30
_CPU_CACHE_TOKENS = 65536
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def server_arguments(args, role: str, model_path: str, tp: int = 1) -> list[str]:
    """Arguments of sglang's launch_server for role "student" or "teacher", without address and model path.

    Reads, all optional: device, sglang_dtype, rollout_max_context_len, rollout_max_response_len, sglang_mem_fraction_static,
    teacher_mem_fraction_static, sglang_cuda_graph_max_bs, teacher_cuda_graph_max_bs, teacher_quantization, rollout_stop,
    rollout_deterministic, trust_remote_code, colocate, rollout_seed, sglang_passthrough (appended last, so that it wins).
    """
    student = role == "student"
    device = getattr(args, "device", "cpu")
    dtype = getattr(args, "sglang_dtype", None) or ("float32" if device == "cpu" else "bfloat16")
    config = model_config(model_path)
    flags = ["--dtype", dtype, "--grammar-backend", "none", "--skip-server-warmup", "--log-level-http", "warning"]
    if not (student and getattr(args, "rollout_stop", None)):
        flags.append("--skip-tokenizer-init")  # ids in, ids out; only stop strings need text
    context = getattr(args, "rollout_max_context_len", None)
    if context:
        flags += ["--context-length", str(context + CONTEXT_SLACK)]
    flags += ["--random-seed", str(getattr(args, "rollout_seed", 42))]
    if not student:  # samples of one prompt wait for the first of them, whose prompt they then find in the cache
        flags += ["--schedule-policy", "lpm"]
    if tp > 1:
        flags += ["--tp-size", str(tp)]
    if getattr(args, "trust_remote_code", False):
        flags.append("--trust-remote-code")
    flags += _cpu(config, dtype, context) if device == "cpu" else _gpu(args, student)
    return flags + list(getattr(args, "sglang_passthrough", None) or [])


def _cpu(config: dict, dtype: str, context: int | None) -> list[str]:
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads", 1)
    width = config.get("head_dim") or config.get("hidden_size", 64) // config.get("num_attention_heads", 1)
    per_token = 2 * config.get("num_hidden_layers", 1) * heads * width * _DTYPE_BYTES.get(dtype, 4)
    longest = (context or config.get("max_position_embeddings", 4096)) + CONTEXT_SLACK
    tokens = max(2 * longest, min(_CPU_CACHE_TOKENS, _CPU_CACHE_BYTES // per_token))
    return [
        "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--disable-overlap-schedule",
        "--disable-cuda-graph", "--sleep-on-idle", "--mem-fraction-static", "0.1", "--max-total-tokens", str(tokens), "--max-running-requests", "64",
    ]  # fmt: skip


def _gpu(args, student: bool) -> list[str]:
    fraction = getattr(args, "sglang_mem_fraction_static" if student else "teacher_mem_fraction_static", None)
    largest = getattr(args, "sglang_cuda_graph_max_bs" if student else "teacher_cuda_graph_max_bs", None)
    batch = (getattr(args, "rollout_batch_size", None) or 64) * (getattr(args, "n_samples_per_prompt", None) or 1)
    graphs = largest or (min(max(batch, 8), 256) if student else 8)  # decoding without a graph is twice as slow; a teacher only scores
    flags = ["--sampling-backend", "pytorch", "--chunked-prefill-size", "8192", "--cuda-graph-max-bs", str(graphs)]
    if not _has_flash_attention():
        flags += ["--attention-backend", "triton"]
    if fraction is not None:
        flags += ["--mem-fraction-static", str(fraction)]
    if not student and getattr(args, "teacher_quantization", None):
        flags += ["--quantization", args.teacher_quantization]
    if student and getattr(args, "rollout_deterministic", False):
        flags.append("--enable-deterministic-inference")
    if student and getattr(args, "colocate", False) and importlib.util.find_spec("torch_memory_saver"):
        flags.append("--enable-memory-saver")
    return flags


def _has_flash_attention() -> bool:
    """Whether the installed kernel package carries FlashAttention 3, SGLang's own choice on Hopper."""
    spec = importlib.util.find_spec("sgl_kernel")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return any(next(Path(folder).glob("flash_ops*"), None) for folder in folders)


def model_config(model_path: str) -> dict:
    """config.json of an HF directory; empty where there is none."""
    file = Path(model_path) / "config.json"
    return json.loads(file.read_text()) if file.is_file() else {}
