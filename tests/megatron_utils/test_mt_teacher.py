"""A teacher of another size inside the trainer: full-vocabulary losses and exact statistics against dense ones."""

import copy

import numpy as np
import pytest
from conftest import data
from test_mt_parity import LAYOUTS, LR, alternate, compare

TEACHER = dict(hidden_size=48, num_hidden_layers=2, seed=5)
LOSSES = ("full_reverse_kl", "full_forward_kl", "full_jsd")
QUICK = {("one", "full_jsd"), ("tp2_sp", "full_reverse_kl"), ("cp2", "full_forward_kl"), ("tp2_pp2", "full_reverse_kl")}
RUN = ("one", "dp2", "tp2_sp", "tp4_sp", "cp2", "pp2", "tp2_pp2", "tp2_dp2_sp", "tp2_cp2_sp")


def matrix():
    for layout in RUN:
        for loss in LOSSES:
            yield pytest.param(layout, loss, marks=() if (layout, loss) in QUICK else pytest.mark.slow, id=f"{layout}-{loss}")


@pytest.mark.parametrize(("layout", "loss"), list(matrix()))
def test_full_losses(pool, models, references, layout, loss):
    teacher = str(models("qwen3", **TEACHER))
    tied = alternate(layout, loss, LOSSES)
    results = pool.run(
        "train", model=models("qwen3", tied), data=data(), opd_loss_type=loss, lr=LR, opd_type="megatron",
        opd_teacher_load=teacher, opd_teacher_offload=layout != "one", **LAYOUTS[layout],
    )  # fmt: skip
    compare(results, references("qwen3", tied, loss, lr=LR, teacher=teacher))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "tp2_cp2_sp", "tp2_pp2"])
def test_few_rows_in_the_last_layers_of_both_models(pool, models, references, layout):
    """Rows few enough for queries of their own, in the student's and in the teacher's last layer."""
    import mt_reference
    import mt_tiny

    batch, teacher = mt_tiny.make_data(seed=11, kept=0.12), str(models("qwen3", **TEACHER))
    results = pool.run(
        "train", model=models("qwen3"), data=batch, opd_loss_type="full_reverse_kl", lr=LR, opd_type="megatron", opd_teacher_load=teacher,
        max_tokens_per_gpu=200, **LAYOUTS[layout],
    )  # fmt: skip
    assert any(r["row_queries"] for r in results)
    compare(results, mt_reference.run(models("qwen3"), batch, "full_reverse_kl", lr=LR, teacher=mt_reference.load(teacher)))


def dense_statistics(student, teacher, batch, i) -> dict:
    import mt_reference
    import torch

    with torch.no_grad():
        s = mt_reference.response_logits(student, batch, i).double().log_softmax(-1)
        t = mt_reference.response_logits(teacher, batch, i).double().log_softmax(-1)
    top = s.topk(5, dim=1)
    target = mt_reference.targets(batch, i)[:, None]
    return {
        "H": -(s.exp() * s).sum(1),
        "KLf": (t.exp() * (t - s)).sum(1),
        "KLr": (s.exp() * (s - t)).sum(1),
        "C": t.exp().gather(1, top.indices).sum(1),
        "student_log_probs": s.gather(1, target)[:, 0],
        "teacher_log_probs": t.gather(1, target)[:, 0],
        "student_topk_ids": top.indices,
        "student_topk_logprobs": top.values,
        "teacher_topk_ids": t.topk(5, dim=1).indices,
        "teacher_topk_logprobs": t.topk(5, dim=1).values,
        "teacher_at_student_ids": t.gather(1, top.indices),
    }


@pytest.mark.parametrize("layout", ["tp2_cp2_sp", *(pytest.param(x, marks=pytest.mark.slow) for x in ("one", "dp2", "tp2_pp2", "cp2_pp2"))])
def test_exact_statistics(pool, models, layout):
    """Of all response tokens; in all layouts but one in several turns, because few of the teacher's hidden states may wait."""
    import mt_reference

    teacher = models("qwen3", **TEACHER)
    found = pool.run(
        "exact", model=models("qwen3"), data=data(), opd_type="megatron", opd_teacher_load=str(teacher), opd_topk_metrics_k=5,
        max_tokens_per_gpu=32, held_bytes=None if layout == "one" else 2000, **LAYOUTS[layout],
    )  # fmt: skip
    dense = [mt_reference.load(m) for m in (models("qwen3"), teacher)]
    seen = set()
    for rank in found:
        for i, values in rank.items():
            seen.add(i)
            for name, expected in dense_statistics(*dense, data(), i).items():
                if name.endswith("topk_ids"):
                    assert values[name].dtype == np.int32
                    np.testing.assert_array_equal(values[name], expected.numpy(), err_msg=name)
                else:
                    np.testing.assert_allclose(values[name], expected.numpy(), atol=2e-5, err_msg=name)
    assert seen == set(range(len(data()["tokens"])))


@pytest.mark.parametrize("loss", ["topk_reverse_kl", "sampled_reverse_kl"])
def test_other_losses_take_their_fields_from_the_teacher(pool, models, loss):
    """Without a SGLang teacher, top-k and sampled-token log-probs come from the model beside the student."""
    import mt_reference

    teacher = models("qwen3", **TEACHER)
    dense = [mt_reference.load(m) for m in (models("qwen3"), teacher)]
    full, bare = copy.deepcopy(data()), copy.deepcopy(data())
    for name in ("teacher_log_probs", "teacher_topk_ids", "teacher_topk_logprobs", "teacher_at_student_ids"):
        del bare[name]
        full[name] = []
    for i in range(len(full["tokens"])):
        found = dense_statistics(*dense, data(), i)
        for name in ("teacher_log_probs", "teacher_topk_ids", "teacher_topk_logprobs", "teacher_at_student_ids"):
            full[name].append(found[name].numpy().astype(np.int32 if name.endswith("topk_ids") else np.float32))
    results = pool.run(
        "train", 2, model=models("qwen3"), data=bare, opd_loss_type=loss, opd_type="megatron", opd_teacher_load=str(teacher), lr=LR,
        opd_topk_metrics_k=5,
    )  # fmt: skip
    compare(results, mt_reference.run(models("qwen3"), full, loss, lr=LR))


@pytest.mark.slow
def test_teacher_from_a_converted_checkpoint(pool, models, references, tmp_path):
    from slime.backends.megatron_utils import convert

    teacher = models("qwen3", **TEACHER)
    convert.hf_to_torch_dist(teacher, tmp_path / "teacher", report=lambda text: None)
    results = pool.run(
        "train", 2, model=models("qwen3"), data=data(), opd_loss_type="full_jsd", lr=LR, opd_type="megatron",
        opd_teacher_load=str(tmp_path / "teacher"), tensor_model_parallel_size=2,
    )  # fmt: skip
    compare(results, references("qwen3", False, "full_jsd", lr=LR, teacher=str(teacher)))


@pytest.mark.slow
def test_vocabularies_of_other_sizes(pool, models):
    """Student 128 ids, teacher 120 or 136: compared over the common ids, on padded shards."""
    import mt_reference
    import torch

    for size in (120, 136):
        teacher = models("qwen3", vocab_size=size, **TEACHER)
        batch = copy.deepcopy(data())
        batch["tokens"] = [np.minimum(t, 119) for t in batch["tokens"]]
        common = min(size, 128)
        student, dense_teacher = mt_reference.load(models("qwen3")), mt_reference.load(teacher)
        total = 0.0
        for i, weight in enumerate(mt_reference.row_weights(batch, "kept_token_mean")):
            with torch.no_grad():
                s, t = (mt_reference.response_logits(m, batch, i)[:, :common].log_softmax(-1) for m in (student, dense_teacher))
            total += float((mt_reference.divergence("reverse_kl", s, t) * weight).sum())
        results = pool.run(
            "train", 2, model=models("qwen3"), data=batch, opd_loss_type="full_reverse_kl", steps=1, opd_type="megatron",
            opd_teacher_load=str(teacher), tensor_model_parallel_size=2, grads=False,
        )  # fmt: skip
        assert results[0]["metrics"][0]["loss"] == pytest.approx(total, rel=1e-5)


def test_what_is_refused(models, tmp_path):
    from mt_cases import make_args

    from slime.backends.megatron_utils.trainer import MegatronTrainer
    from ta_opd.errors import ConfigError

    def build(**changes):
        MegatronTrainer(make_args(models("qwen3"), **changes), 0, changes.pop("world", 1), 0, "127.0.0.1", 1)

    with pytest.raises(ConfigError, match="full_jsd needs --opd-type megatron"):
        build(opd_loss_type="full_jsd")
    with pytest.raises(ConfigError, match="--opd-teacher-load"):
        build(opd_type="megatron", opd_teacher_load=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="--opd-teacher-hf"):
        build(opd_type="megatron", opd_teacher_load=str(tmp_path))
    with pytest.raises(ConfigError, match="teacher.*2 layers"):
        MegatronTrainer(
            make_args(models("qwen3"), opd_type="megatron", opd_teacher_load=str(models("qwen3", **TEACHER)),
                      pipeline_model_parallel_size=4), 0, 4, 0, "127.0.0.1", 1,
        )  # fmt: skip
