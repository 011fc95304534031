"""Names, needs and errors of the losses; what can be checked before anything starts."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from slime.backends.megatron_utils.losses import registry
from slime.backends.megatron_utils.losses.options import head_options
from slime.backends.megatron_utils.losses.registry import LOSS_TYPES, get_loss, register_loss
from slime.backends.megatron_utils.losses.types import Rows
from slime.backends.megatron_utils.losses.vocab_parallel import VocabShard, reshard_vocab
from slime.utils.fields import for_rows
from ta_opd.errors import ConfigError, DataError

ARGS = SimpleNamespace()


def test_every_name_is_there_with_its_needs():
    row_fields = set(Rows.__dataclass_fields__)
    for name in LOSS_TYPES:
        spec = get_loss(name)
        assert spec.name == name and spec.needs <= row_fields and spec.teacher in ("logprob", "topk", "hidden")
    assert set(registry._REGISTRY) >= set(LOSS_TYPES)
    with pytest.raises(ConfigError, match="full_jsd.*got 'k4'"):
        get_loss("k4")


def test_needs_follow_the_support():
    spec = get_loss("topk_reverse_kl")
    student = SimpleNamespace(opd_topk_support="student")
    assert spec.needs_for(ARGS) == {"teacher_ids_RK", "teacher_logps_RK"}
    assert spec.needs_for(student) == {"student_ids_RK", "teacher_at_student_RK"}
    assert get_loss("sampled_reverse_kl").needs_for(student) == get_loss("sampled_reverse_kl").needs


def test_needs_are_shipped_by_the_field_manifest():
    """Every rollout-side need of a loss is a `row` of slime.utils.fields, or the sampled token itself."""
    for name in LOSS_TYPES:
        spec = get_loss(name)
        if spec.teacher == "hidden":
            continue
        for needs in filter(None, (spec.needs, spec.needs_student)):
            base = set(for_rows(()))
            for need in needs - {"target_R"}:
                assert set(for_rows({need})) > base or need in ("student_logp_old_R", "teacher_logp_R"), need


def test_names_cost_no_torch_import():
    code = "import sys; from slime.backends.megatron_utils.losses.registry import LOSS_TYPES; " \
           "from slime.backends.megatron_utils.losses.reduction import REDUCTIONS; " \
           "assert LOSS_TYPES and REDUCTIONS and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


def test_own_loss_can_be_registered(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @register_loss("mine", needs={"target_R"}, teacher="logprob")
    def mine(hidden_RH, weight_VH, rows, args, tp_group=None):
        return "called"

    assert get_loss("mine")(torch.zeros(2, 3), None, Rows(target_R=torch.zeros(2, dtype=torch.int64)), ARGS) == "called"
    with pytest.raises(ConfigError, match="registered already"):
        register_loss("mine", needs=set(), teacher="logprob")(mine)


def _call(name="topk_reverse_kl", rows=None, hidden=None, weight=None, **args):
    hidden = torch.zeros(3, 4) if hidden is None else hidden
    weight = torch.zeros(10, 4) if weight is None else weight
    rows = rows or Rows(teacher_ids_RK=torch.zeros(3, 2, dtype=torch.int32), teacher_logps_RK=torch.full((3, 2), -1.0))
    return get_loss(name)(hidden, weight, rows, SimpleNamespace(**args))


def test_bad_rows_are_named():
    with pytest.raises(DataError, match=r"got None for \['teacher_logp_R'\]"):
        _call("sampled_reverse_kl", Rows(target_R=torch.zeros(3, dtype=torch.int64), student_logp_old_R=torch.zeros(3)))
    with pytest.raises(DataError, match="expected 3 rows in teacher_ids_RK, got 2"):
        _call(rows=Rows(teacher_ids_RK=torch.zeros(2, 2, dtype=torch.int64), teacher_logps_RK=torch.zeros(3, 2)))
    with pytest.raises(DataError, match="expected integers in teacher_ids_RK, got torch.float32"):
        _call(rows=Rows(teacher_ids_RK=torch.zeros(3, 2), teacher_logps_RK=torch.zeros(3, 2)))


def test_bad_head_is_named():
    with pytest.raises(ConfigError, match=r"\(3, 5\)"):
        _call(hidden=torch.zeros(3, 5))
    with pytest.raises(ConfigError, match="one dtype"):
        _call(hidden=torch.zeros(3, 4, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match="vocabulary of 1 to 10 ids.*got 11"):
        _call(vocab_size=11)
    with pytest.raises(ConfigError, match="rollout_temperature > 0.*got 0.0"):
        _call(rollout_temperature=0.0)
    with pytest.raises(ConfigError, match="0 < opd_jsd_beta < 1, got 1.0"):
        _call("topk_jsd", opd_jsd_beta=1.0)
    with pytest.raises(ConfigError, match="at least 10 rows.*got 8"):
        _call("full_jsd", Rows(teacher_hidden_RH=torch.zeros(3, 2), teacher_weight_VH=torch.zeros(8, 2)))


def test_a_second_backward_is_refused_not_wrong():
    hidden = torch.randn(3, 4, requires_grad=True)
    rows = Rows(teacher_ids_RK=torch.zeros(3, 2, dtype=torch.int64), teacher_logps_RK=torch.full((3, 2), -1.0))
    rows.factor_R = torch.ones(3)
    out = _call(hidden=hidden, rows=rows)
    out.total.backward(retain_graph=True)
    with pytest.raises(ArithmeticError, match="got a second one"):
        out.total.backward()


def test_no_grad_gives_values_only():
    rows = Rows(teacher_ids_RK=torch.tensor([[1, 2]] * 3), teacher_logps_RK=torch.full((3, 2), -1.0))
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    expected = _call(hidden=hidden, weight=weight, rows=rows).loss_R
    with torch.no_grad():
        plain = _call(hidden=hidden, weight=weight, rows=rows)
        rows.factor_R = torch.tensor([1.0, 0.0, 2.0])
        known = _call(hidden=hidden, weight=weight, rows=rows)
    assert not plain.loss_R.requires_grad and torch.equal(plain.loss_R, expected) and torch.equal(known.loss_R, expected)
    assert known.total.item() == pytest.approx((expected * rows.factor_R).sum().item())


def test_vocab_shards():
    group = SimpleNamespace(size=lambda: 4, rank=lambda: 3)
    assert VocabShard.of(16, 61, group) == VocabShard(48, 16, 13, 61, group)
    assert VocabShard.of(64, 61, group).valid == 0
    assert VocabShard.of(16, 61, group).common_with(50) == VocabShard(48, 16, 2, 50, group)
    columns, here = VocabShard(48, 16, 13, 61, None).local(torch.tensor([-1, 48, 60, 61, 3]))
    assert columns.tolist() == [0, 0, 12, 0, 0] and here.tolist() == [False, True, True, False, False]
    weight = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(reshard_vocab(weight, 4, None), torch.cat([weight, torch.zeros(1, 2)]))
    assert torch.equal(reshard_vocab(weight, 2, None), weight[:2])


def test_head_options_read_the_arguments():
    head = head_options(torch.zeros(8, 2), SimpleNamespace(vocab_size=7, rollout_temperature=0.5, loss_chunk_rows=3), None)
    assert (head.shard.valid, head.inv_temperature, head.chunk_rows) == (7, 2.0, 3)
