"""The CPU support: what children inherit, hooks that do nothing twice, and the seeded sampler."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from slime.backends.sglang_utils import cpu_support
from slime.backends.sglang_utils.cpu_support import hooks


def test_children_inherit_it_and_the_callers_environment_stays():
    base = {"PYTHONPATH": "/a:/b", "HOME": "/h"}
    env = cpu_support.child_environment(base, threads=3)
    assert env["PYTHONPATH"].split(os.pathsep) == [str(cpu_support.SITE), "/a", "/b"] and env["OMP_NUM_THREADS"] == "3"
    assert cpu_support.child_environment(env)["PYTHONPATH"] == env["PYTHONPATH"]
    assert base == {"PYTHONPATH": "/a:/b", "HOME": "/h"}


def python(code, tmp_path, **env):
    environment = {**cpu_support.child_environment({**os.environ, "PYTHONPATH": str(tmp_path)}), **env}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_a_child_finds_the_stand_ins_and_another_sitecustomize_still_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['OTHER_SITE'] = 'ran'\n")
    code = (
        "import os, sys, sgl_kernel, triton\n"
        "print(os.environ.get('OTHER_SITE'), 'sgl_kernel' in sgl_kernel.__file__, 'torch' in sys.modules)\n"
        "try: sgl_kernel.anything(1)\nexcept NotImplementedError as e: print('no' in str(e))\n"
    )
    assert python(code, tmp_path) == ["ran", "True", "False", "True"]


def test_without_the_switch_nothing_is_installed(tmp_path):
    code = "import sys; print(any(type(f).__name__ == '_AfterImport' and f.name.startswith('sglang') for f in sys.meta_path))"
    assert python(code, tmp_path, SGLANG_USE_CPU_ENGINE="0") == ["False"]


def test_torchvision_and_transformers_models_import_here():
    cpu_support.install_torchvision_schema()
    cpu_support.install_torchvision_schema()
    import torchvision.ops  # noqa: F401
    from transformers import Qwen3ForCausalLM  # noqa: F401


@pytest.fixture
def draw():
    module = SimpleNamespace()
    hooks._sample_with_seed(module)
    return module.multinomial_with_seed


def test_seeded_sampling_follows_the_distribution(draw):
    torch.manual_seed(0)
    n, probs = 20000, torch.tensor([0.5, 0.0, 0.25, 0.2, 0.05])
    ids = draw(probs.log().expand(n, -1), torch.arange(n), torch.full((n,), 11))
    shares = torch.bincount(ids.view(-1), minlength=5) / n
    assert ids.shape == (n, 1) and shares[1] == 0
    assert (shares - probs).abs().max() < 0.015  # four standard deviations of a share of n draws


def test_seeded_sampling_repeats_and_depends_on_seed_and_position(draw):
    logprobs = torch.randn(400, 50).log_softmax(-1)
    seed, position = torch.arange(400), torch.arange(400) % 7
    first = draw(logprobs, seed, position)
    assert torch.equal(first, draw(logprobs, seed, position))
    alone = torch.cat([draw(logprobs[i : i + 1], seed[i : i + 1], position[i : i + 1]) for i in range(400)])
    assert torch.equal(first, alone)  # whatever is in the batch beside it
    assert (first != draw(logprobs, seed + 1, position)).float().mean() > 0.5
    assert (first != draw(logprobs, seed, position + 1)).float().mean() > 0.5


def test_neighbouring_positions_are_not_correlated(draw):
    n = 20000
    logprobs = torch.zeros(n, 2).log_softmax(-1)
    a = draw(logprobs, torch.full((n,), 42), torch.arange(n)).view(-1).float()
    b = draw(logprobs, torch.full((n,), 42), torch.arange(n) + 1).view(-1).float()
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.03 and abs(a.mean() - 0.5) < 0.02
