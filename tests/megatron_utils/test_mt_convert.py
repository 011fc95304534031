"""Conversion both ways: exact round trips, checkpoints that trainers of any layout load, memory, and bad input."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data
from safetensors.torch import load_file, save_file

from slime.backends.megatron_utils import convert
from slime.backends.megatron_utils.hf_files import HFReader, HFWriter
from slime.backends.megatron_utils.torch_dist_files import TorchDistReader, TorchDistWriter
from ta_opd.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quiet(text: str) -> None:
    pass


@pytest.mark.parametrize(("family", "tied"), [("qwen3", False), ("qwen3", True), ("qwen2", False), ("llama", True), ("qwen3_moe", False)])
def test_round_trip_is_exact(models, tmp_path, family, tied):
    model = models(family, tied)
    (model / "tokenizer.json").write_text("{}")
    release = convert.hf_to_torch_dist(model, tmp_path / "dist", vocab_multiple=48, report=quiet)
    assert TorchDistReader(release).shape("embedding.word_embeddings.weight") == (144, convert.load_shape(model).hidden_size)
    out = convert.torch_dist_to_hf(release, model, tmp_path / "hf", shard_bytes=20_000, report=quiet)
    before, after = HFReader(model), HFReader(out)
    assert set(before.names()) == set(after.names())
    for name in before.names():
        assert torch.equal(before.get(name), after.get(name)), name
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert (out / "tokenizer.json").read_text() == "{}"
    assert json.loads((out / "config.json").read_text()) == json.loads((model / "config.json").read_text())


def test_output_loads_in_transformers(models, tmp_path):
    import mt_reference

    model = models("qwen3")
    release = convert.hf_to_torch_dist(model, tmp_path / "dist", report=quiet)
    out = convert.torch_dist_to_hf(release, model, tmp_path / "hf", dtype=torch.bfloat16, report=quiet)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    loaded, origin = mt_reference.load(out), mt_reference.load(model)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert (loaded(ids).logits - origin(ids).logits).abs().max() < 0.1


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", dict(ranks=2, tensor_model_parallel_size=2)),
        pytest.param("qwen3_moe", dict(ranks=2, expert_model_parallel_size=2), marks=pytest.mark.slow),
        pytest.param("qwen2", dict(ranks=2, pipeline_model_parallel_size=2), marks=pytest.mark.slow),
    ],
)
def test_trainers_load_converted_weights(pool, models, tmp_path, family, layout):
    """A converted model trains as the HF directory does, and its checkpoint converts back to the trained weights."""
    model = models(family)
    convert.hf_to_torch_dist(model, tmp_path / "dist", report=quiet)
    direct = pool.run("train", model=model, data=data(), steps=1, grads=False, **layout)
    converted = pool.run(
        "train_and_save", model=model, data=data(), load=str(tmp_path / "dist"), save=str(tmp_path / "run"), **layout
    )
    assert converted[0]["start"] == 0
    for name, expected in direct[0]["weights"].items():
        np.testing.assert_array_equal(converted[0]["weights"][name], expected, err_msg=name)
    out = convert.torch_dist_to_hf(convert.checkpoint_directory(tmp_path / "run"), model, tmp_path / "hf", report=quiet)
    reader = HFReader(out)
    assert set(reader.names()) == set(direct[0]["weights"])
    for name, expected in direct[0]["weights"].items():
        np.testing.assert_array_equal(reader.get(name).numpy(), expected, err_msg=name)


def test_save_hf_of_a_trainer(pool, models, tmp_path):
    weights = pool.run("save_hf", 2, model=models("qwen3", True), out=str(tmp_path / "hf"), tensor_model_parallel_size=2)[0]
    reader = HFReader(tmp_path / "hf")
    assert set(reader.names()) == set(weights)
    for name in weights:
        np.testing.assert_array_equal(reader.get(name).numpy(), weights[name])


def test_stacked_layers_of_stock_megatron(pool, models, tmp_path):
    """Checkpoints with layers stacked on one axis, as stock Megatron may write them, load and convert."""
    model = models("qwen3")
    shape = convert.load_shape(model)
    reader = HFReader(model)
    writer = TorchDistWriter(tmp_path / "dist" / "iter_0000005", file_bytes=30_000)
    from slime.backends.megatron_utils.weights import read_shard

    for entry in convert.entries(shape, stacked=True):
        t = read_shard(reader, entry.rule, shape, 0, 1, shape.vocab_size)
        lead = len(entry.index)
        writer.add(entry.key, t.reshape((1,) * lead + t.shape), (*entry.stack, *t.shape), (*entry.index, *(0,) * t.dim()))
    writer.close({"iteration": 5})
    (tmp_path / "dist" / "latest_checkpointed_iteration.txt").write_text("5")
    out = convert.torch_dist_to_hf(convert.checkpoint_directory(tmp_path / "dist"), model, tmp_path / "hf", report=quiet)
    for name in reader.names():
        assert torch.equal(reader.get(name), HFReader(out).get(name)), name
    loaded = pool.run("save_hf", 1, model=model, out=str(tmp_path / "hf2"), load=str(tmp_path / "dist"))[0]
    for name in reader.names():
        np.testing.assert_array_equal(reader.get(name).numpy(), loaded[name])


def test_streams_in_bounded_memory(tmp_path):
    """A 400 MB model in one file converts both ways in less than 60 MB of its own memory and little of files kept mapped."""
    script = f"""
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from slime.backends.megatron_utils import convert
root = Path({str(tmp_path)!r})
cfg = dict(model_type="qwen3", hidden_size=512, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8,
           num_key_value_heads=8, head_dim=64, vocab_size=2048, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True)
(root / "hf").mkdir()
(root / "hf" / "config.json").write_text(json.dumps(cfg))
from slime.backends.megatron_utils.hf_config import load_shape
from slime.backends.megatron_utils.weights import hf_names
sizes = {{"q_proj": (512, 512), "k_proj": (512, 512), "v_proj": (512, 512), "o_proj": (512, 512), "gate_proj": (2048, 512),
          "up_proj": (2048, 512), "down_proj": (512, 2048), "q_norm": (64,), "k_norm": (64,), "embed_tokens": (2048, 512)}}
index, total = {{}}, 0
for n, name in enumerate(hf_names(load_shape(root / "hf"))):
    t = torch.zeros(sizes.get(name.split(".")[-2], (512,)))
    total += t.numel() * 4
    index[name] = t
save_file(index, root / "hf" / "model.safetensors")
del index, t
import threading, time
from slime.backends.megatron_utils import hf_files
hf_files.MAPPED_BYTES = 40 << 20
def memory():
    kinds = dict(line.split()[:2] for line in open("/proc/self/status") if line.startswith(("RssAnon", "RssFile")))
    return [int(kinds[k]) * 1024 for k in ("RssAnon:", "RssFile:")]
peak, stop = [0, 0], []
def watch():
    while not stop:
        peak[:] = map(max, peak, memory())
        time.sleep(0.002)
before = memory()
threading.Thread(target=watch, daemon=True).start()
release = convert.hf_to_torch_dist(root / "hf", root / "dist", report=lambda s: None)
convert.torch_dist_to_hf(release, root / "hf", root / "out", report=lambda s: None)
stop.append(1)
print(json.dumps([total, peak[0] - before[0], peak[1] - before[1]]))
"""
    path = f"{ROOT}:{ROOT / 'slime_ta_opd'}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env={"PYTHONPATH": path, "PATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    total, own, mapped = json.loads(done.stdout.splitlines()[-1])
    assert total > 380e6
    assert own < 60e6, f"{own / 1e6:.0f} MB for a model of {total / 1e6:.0f} MB"
    assert mapped < 100e6, f"{mapped / 1e6:.0f} MB of mapped files"


def test_bad_models_are_refused(models, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(models("qwen3"), model)
    config = json.loads((model / "config.json").read_text())

    def rewrite(**changes):
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    rewrite(model_type="mamba2")
    with pytest.raises(ConfigError, match="mamba2.*expected one of qwen3, qwen2, llama, qwen3_moe"):
        convert.hf_to_torch_dist(model, tmp_path / "dist", report=quiet)
    rewrite(hidden_size=64)
    with pytest.raises(DataError, match="expected shape"):
        convert.hf_to_torch_dist(model, tmp_path / "dist", report=quiet)
    rewrite(num_hidden_layers=5)
    with pytest.raises(DataError, match="model.layers.4"):
        convert.hf_to_torch_dist(model, tmp_path / "dist", report=quiet)
    rewrite()
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(DataError, match="1 tensors.*model.norm.weight"):
        convert.hf_to_torch_dist(model, tmp_path / "dist", report=quiet)
    assert not (tmp_path / "dist" / "latest_checkpointed_iteration.txt").exists()


def test_existing_targets_and_wrong_checkpoints(models, tmp_path):
    model = models("qwen3")
    release = convert.hf_to_torch_dist(model, tmp_path / "dist", report=quiet)
    with pytest.raises(ConfigError, match="--force"):
        convert.hf_to_torch_dist(model, tmp_path / "dist", report=quiet)
    convert.hf_to_torch_dist(model, tmp_path / "dist", force=True, report=quiet)
    with pytest.raises(DataError, match="missing|expected shape"):
        convert.torch_dist_to_hf(release, models("llama"), tmp_path / "hf", report=quiet)
    with pytest.raises(ConfigError, match="--vocab-size"):
        convert.torch_dist_to_hf(release, model, tmp_path / "hf", vocab_size=100, report=quiet)
    assert not (tmp_path / "hf").exists()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "keep.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--force"):
        convert.torch_dist_to_hf(release, model, tmp_path / "hf", report=quiet)
    with pytest.raises(DataError, match="common.pt"):
        convert.torch_dist_to_hf(model, model, tmp_path / "new", report=quiet)
    (release / next(p.name for p in release.glob("*.distcp"))).unlink()
    with pytest.raises(DataError, match="missing"):
        convert.torch_dist_to_hf(release, model, tmp_path / "new", report=quiet)


def test_files_that_are_cut_off(models, tmp_path):
    """Incomplete downloads and damaged checkpoints are named, and leave nothing behind."""
    model = tmp_path / "model"
    shutil.copytree(models("qwen3"), model)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="model.safetensors: cannot be read as safetensors.*incomplete download"):
        convert.hf_to_torch_dist(model, tmp_path / "dist", report=quiet)
    weights.write_bytes(whole)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: weights.name for n in [*HFReader(model).names(), "lm_head.other"]}}))
    with pytest.raises(DataError, match="lm_head.other.*does not hold it"):
        HFReader(model).get("lm_head.other")
    index.write_text("{")
    with pytest.raises(DataError, match="weight_map"):
        convert.hf_to_torch_dist(model, tmp_path / "dist", report=quiet)
    index.unlink()
    release = convert.hf_to_torch_dist(model, tmp_path / "dist", report=quiet)
    part = next(release.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-5000])
    with pytest.raises(DataError, match="cannot be read|damaged"):
        convert.torch_dist_to_hf(release, model, tmp_path / "hf", report=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dist", "model"]


def test_a_full_disk_is_said_and_leaves_nothing(models, tmp_path, capsys):
    """Writes beyond a limit fail as on a full disk."""
    import resource

    model, dist = str(models("qwen3")), tmp_path / "dist"
    release = convert.hf_to_torch_dist(model, tmp_path / "good", report=quiet)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        to_dist = tool("convert_hf_to_torch_dist").main(["--hf-checkpoint", model, "--save", str(dist)])
        to_hf = ["--input-dir", str(release), "--origin-hf-dir", model, "--output-dir", str(tmp_path / "hf")]
        to_hf = tool("convert_torch_dist_to_hf").main(to_hf)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (to_dist, to_hf) == (1, 1)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("convert_")]
    assert len(errors) == 2, errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good"]


def test_tools(models, tmp_path, capsys):
    model = str(models("qwen3"))
    to_dist, to_hf, run_to_hf = (
        tool(n) for n in ("convert_hf_to_torch_dist", "convert_torch_dist_to_hf", "convert_megatron_checkpoint_to_hf")
    )
    dist, hf = str(tmp_path / "dist"), str(tmp_path / "hf")
    assert to_dist.main(["--hf-checkpoint", model, "--save", dist, "--check-only"]) == 0
    assert to_dist.main(["--hf-checkpoint", model, "--save", dist, "--num-layers", "3"]) == 1
    assert "num_hidden_layers = 4" in capsys.readouterr().err
    known = ["--num-layers", "4", "--swiglu", "--no-rope-fusion", "--transformer-impl", "local"]
    assert to_dist.main(["--hf-checkpoint", model, "--save", dist, *known]) == 0
    assert "ignored" in capsys.readouterr().err
    assert run_to_hf.main(["--checkpoint-root", dist, "--origin-hf-dir", model, "--output-dir", hf, "--dry-run"]) == 0
    assert not Path(hf).exists()
    released = ["--iteration", "latest", "--slime-dir", "/x", "--parallel", "--load-max-workers", "2", "--save-max-workers", "16"]
    assert run_to_hf.main(["--checkpoint-root", dist, "--origin-hf-dir", model, "--output-dir", hf, *released]) == 0
    assert run_to_hf.main(["--checkpoint-root", dist, "--origin-hf-dir", model, "--output-dir", hf]) == 1
    assert "--force" in capsys.readouterr().err
    assert to_hf.main(["--input-dir", f"{dist}/release", "--origin-hf-dir", model, "--output-dir", hf, "-f"]) == 0
    assert run_to_hf.main(["--checkpoint-root", dist, "--iteration", "9", "--origin-hf-dir", model, "--output-dir", hf]) == 1
    assert "iter_0000009" in capsys.readouterr().err


def test_unfinished_output_is_not_in_place(models, tmp_path):
    writer = HFWriter(tmp_path / "hf", shard_bytes=10)
    writer.add("a", torch.zeros(4))
    writer.add("b", torch.zeros(4))
    assert not (tmp_path / "hf").exists()
    writer.close(models("qwen3"), torch.float32)
    assert HFReader(tmp_path / "hf").names() == ["a", "b"]
