"""Every metric column against the plain loop over its definition, on both dtypes and all supports."""

import math

import numpy as np
import pytest
from method_cases import metrics_of, random_samples

from benchmarks import selection_oracle as oracle
from ta_opd.errors import ConfigError, DataError
from ta_opd.metrics import METRIC_COLUMNS, position_columns, token_metrics
from ta_opd.topk import TopK, TopKParts
from ta_opd.union import ordered_sum

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # nan, inf, division by zero
K = 6


def one_token(student: dict, teacher: dict, known: dict | None = None, K: int = 3, **options) -> dict:
    """Columns of a single token from id -> probability."""
    sides = [
        TopK.from_lists([[[math.log(p), i, None] for i, p in side.items()]], K, dtype=np.float64) for side in (student, teacher)
    ]
    if known is not None:
        options["teacher_at_student_ids"] = np.array([[math.log(known[i]) if i in known else np.nan for i in student]])
    metrics = token_metrics(
        *sides, sampled_ids=[1], student_logprobs=[-0.5], teacher_logprobs=[-1.0], response_lengths=[1], **options
    )
    return {name: column[0] for name, column in metrics.items()}


GOLDEN = [
    ({1: 0.6, 2: 0.3, 3: 0.05}, {1: 0.6, 2: 0.3, 3: 0.05}, (0.736571, 0, 0, 0.95, 1, 1)),
    ({1: 0.9, 2: 0.05, 3: 0.01}, {2: 0.7, 1: 0.25, 3: 0.02}, (0.238439, 1.578266, 1.066567, 0.97, 1, 0.700078)),
    ({1: 0.9, 2: 0.05, 3: 0.01}, {7: 0.8, 8: 0.1, 1: 0.05}, (0.238439, 25.643489, 4.225399, 0.05, 0.333333, 0.222132)),
    ({1: 0.9, 2: 0.05, 3: 0.01}, {7: 0.8, 8: 0.1, 9: 0.05}, (0.238439, 27.094357, 27.369069, 0, 0, 3e-6)),
    ({1: 0.9, 2: 0.05}, {}, (0.297472, 0, 0, 0, 0, 0)),
]


@pytest.mark.parametrize("student, teacher, expected", GOLDEN)
def test_golden_vectors(student, teacher, expected):
    got = one_token(student, teacher)
    names = ("Hs_topk_norm", "KLf_union", "KLr_union", "Cmass", "Coverlap", "CBC")
    np.testing.assert_allclose([got[name] for name in names], expected, atol=6e-7)


def test_golden_exact_mass():
    student, teacher, _ = GOLDEN[2]
    got = one_token(student, teacher, {1: 0.05, 2: 0.02, 3: 0.001})
    values = [got[name] for name in ("Cmass", "Cmass_true", "Cmass_topk", "Cmass_exact")]
    np.testing.assert_allclose(values, [0.071, 0.071, 0.05, 1])


def test_mass_known_in_part_is_exact_only_when_asked():
    student, teacher, _ = GOLDEN[2]
    part = one_token(student, teacher, {2: 0.02})
    assert (part["Cmass"], part["Cmass_exact"]) == (part["Cmass_topk"], 0) and math.isnan(part["Cmass_true"])
    released = one_token(student, teacher, {2: 0.02}, partly_exact=True)
    assert released["Cmass_exact"] == 1 and released["Cmass"] == pytest.approx(0.02)


@pytest.mark.parametrize("support", ["union_floor", "union_tail"])
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 2e-5)])
@pytest.mark.parametrize("seed", range(4))
def test_every_column_equals_the_plain_loop(support, dtype, tolerance, seed):
    samples = random_samples(seed, K, num=12)
    metrics, _ = metrics_of(samples, K, dtype, support=support)
    table = oracle.rows(samples, K, support)
    compared = set()
    for name, column in metrics.items():
        if name in table[0]:
            compared.add(name)
            expected = [row[name] for row in table]
            np.testing.assert_allclose(column, expected, rtol=tolerance, atol=tolerance, err_msg=name)
    assert len(compared) == 22


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_token_does_not_depend_on_where_it_stands(dtype):
    samples = random_samples(3, K, num=40)
    together, lengths = metrics_of(samples, K, dtype)
    starts = np.cumsum([0, *lengths])
    for sample, start, end in zip(samples[:7], starts, starts[1:], strict=False):
        if end > start:
            alone, _ = metrics_of([sample], K, dtype)
            for name in METRIC_COLUMNS:
                np.testing.assert_array_equal(together[name][start:end], alone[name], err_msg=name)


def test_blocks_join_without_a_seam(monkeypatch):
    samples = random_samples(5, K, num=30)
    whole, _ = metrics_of(samples, K, np.float32)
    monkeypatch.setattr("ta_opd.metrics.BLOCK_SLOTS", 1)
    blocks, _ = metrics_of(samples, K, np.float32)
    for name in METRIC_COLUMNS:
        np.testing.assert_array_equal(whole[name], blocks[name], err_msg=name)


def test_tail_support_is_a_divergence_and_has_no_floor_artefacts():
    samples = random_samples(8, K, num=40)
    floor, _ = metrics_of(samples, K)
    tail, _ = metrics_of(samples, K, support="union_tail")
    assert (tail["KLf_union"] > -1e-12).all() and (tail["KLr_union"] > -1e-12).all() and (tail["CBC"] < 1 + 1e-12).all()
    # 1e-12 costs some 27 nats per nat of teacher-only probability; the tail bound cannot exceed -ln of the resolution by much.
    disjoint = (floor["Coverlap"] == 0) & (floor["Cmass_topk"] == 0) & (floor["KLf_union"] > 0)
    assert disjoint.any() and floor["KLf_union"][disjoint].min() > 20
    assert tail["KLf_union"].max() < 16


def test_tail_support_worked_example():
    # Mass .96 and .95, one missing member each; student R = .04, min(.01, .04/3) = .01; teacher R = .05, min(.05, .05/3) = .05/3.
    got = one_token({1: 0.9, 2: 0.05, 3: 0.01}, {7: 0.8, 8: 0.1, 1: 0.05}, support="union_tail")
    q_s = np.array([0.9, 0.05, 0.01, 0.01, 0.01, 0.02])
    q_t = np.array([0.05, 0.05 / 3, 0.05 / 3, 0.8, 0.1, 0.05 / 3])
    assert got["KLf_union"] == pytest.approx((q_t * np.log(q_t / q_s)).sum(), rel=1e-12)
    assert got["CBC"] == pytest.approx(np.sqrt(q_t * q_s).sum(), rel=1e-12)


@pytest.mark.parametrize("mass", [1.0, 1 - 1e-8, 1 - 1e-5])
def test_tail_support_when_next_to_nothing_is_left(mass):
    student, teacher = {1: 0.9 * mass, 2: 0.1 * mass}, {3: 0.7, 1: 0.25, 2: 0.02}
    expected = oracle.union_tail(student, teacher)
    got = one_token(student, teacher, support="union_tail")
    np.testing.assert_allclose([got[name] for name in ("KLf_union", "KLr_union", "CBC")], expected, rtol=1e-9)


def test_padding_is_never_the_sampled_token():
    topk = TopK.from_lists([[[-0.1, 1, None]]], 3)
    got = token_metrics(topk, topk, sampled_ids=[-1], student_logprobs=[0], teacher_logprobs=[0], response_lengths=[1])
    assert got["target_student_rank"][0] == 0 == got["target_in_teacher_topk"][0]


def test_exact_support_takes_the_full_vocabulary_values():
    full = {"H": np.array([1.5]), "KLf": np.array([0.25]), "KLr": np.array([0.75]), "C": np.array([0.5])}
    got = one_token(*GOLDEN[1][:2], support="exact", exact={**full, "vocab_size": 100})
    assert (got["Hs_topk"], got["KLf_union"], got["KLr_union"], got["Cmass"], got["Cmass_true"]) == (1.5, 0.25, 0.75, 0.5, 0.5)
    assert got["Cmass_exact"] == 1 and got["Cmass_topk"] == pytest.approx(0.97)
    assert got["Hs_topk_norm"] == pytest.approx(1.5 / math.log(100))
    with pytest.raises(DataError, match="KLr, C"):
        one_token(*GOLDEN[1][:2], support="exact", exact={"H": full["H"], "KLf": full["KLf"]})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_repeated_ids_in_hand_made_arrays_count_once(dtype):
    ids = np.array([[4, 5, 4], [4, 5, 6]], np.int32)
    logprobs = np.log(np.array([[0.5, 0.3, 0.1], [0.5, 0.3, 0.1]])).astype(dtype)
    arguments = dict(sampled_ids=[4, 4], student_logprobs=[0, 0], teacher_logprobs=[0, 0], response_lengths=[2])
    got = token_metrics(TopK(ids, logprobs), TopK(ids[::-1].copy(), logprobs), **arguments)
    np.testing.assert_allclose(got["student_topk_mass"], [0.4, 0.9], rtol=1e-6)
    np.testing.assert_allclose(got["Coverlap"], [2 / 3, 2 / 3], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("support", ["union_floor", "union_tail"])
def test_extreme_and_missing_log_probs_give_no_nan(dtype, support):
    values = [0.0, 5.0, 1e4, -90.0, -800.0, -1e30, -np.inf, np.inf, np.nan]
    rng = np.random.default_rng(0)
    ids = np.tile(np.arange(4, dtype=np.int32), (300, 1))
    ids[rng.random(ids.shape) < 0.1] = -1
    sides = [TopK(ids + np.int32(side) * (ids >= 0), rng.choice(values, ids.shape).astype(dtype)) for side in (0, 2)]
    got = token_metrics(
        *sides, sampled_ids=ids[:, 0], student_logprobs=rng.choice(values, 300), teacher_logprobs=rng.choice(values, 300),
        response_lengths=[300], support=support,
    )  # fmt: skip
    may_be_nan = {"student_logp_sampled", "teacher_logp_sampled", "sampled_reverse_kl", "sampled_teacher_adv", "Cmass_true"}
    for name, column in got.items():
        assert name in may_be_nan or np.isfinite(column).all(), name
    for name in ("Cmass", "student_topk_mass", "Hs_topk_norm", "Coverlap"):
        assert got[name].min() >= 0 and got[name].max() <= 1 + 1e-6, name


def test_prefix_ema_of_ragged_samples():
    samples = random_samples(11, K, num=9)
    metrics, _ = metrics_of(samples, K, prefix_ema_alpha=0.25)
    expected = [row["Cprefix_ema"] for row in oracle.rows(samples, K, alpha=0.25)]
    np.testing.assert_array_equal(metrics["Cprefix_ema"], expected)


def test_sampled_columns():
    got = one_token(*GOLDEN[0][:2])
    assert (got["sampled_reverse_kl"], got["sampled_teacher_adv"]) == (0.5, -0.5)
    lists = [[[-0.1, 1, None]]]
    topk = TopK.from_lists(lists, 1)
    nothing = token_metrics(
        topk, topk, sampled_ids=[1], student_logprobs=[np.nan], teacher_logprobs=[-np.inf], response_lengths=[1]
    )
    assert np.isnan(nothing["sampled_reverse_kl"][0])


def test_columns_and_encodings():
    metrics, _ = metrics_of(random_samples(1, K, num=20), K, np.float32)
    assert tuple(metrics) == METRIC_COLUMNS
    assert metrics["student_top1_id"].dtype == np.int32 and metrics["reach_t1"].dtype == np.int8
    assert metrics["KLf_union"].dtype == np.float32
    empty = metrics["student_topk_mass"] == 0
    assert empty.any() and (metrics["student_top1_id"][empty] == -1).all() and (metrics["target_student_rank"][empty] == 0).all()
    positions = position_columns([1, 0, 2, 3])
    assert positions["tok_pos"].tolist() == [0, 0, 1, 0, 1, 2] and positions["sample"].tolist() == [0, 2, 2, 3, 3, 3]
    assert positions["pos_norm"].tolist() == [0, 0, 1, 0, 0.5, 1]


def test_without_top_k_everything_is_zero():
    nothing = TopK.empty(3, 0)
    got = token_metrics(
        nothing, nothing, sampled_ids=[1, 2, 3], student_logprobs=[-1] * 3, teacher_logprobs=[-2] * 3, response_lengths=[3]
    )
    assert got["sampled_reverse_kl"].tolist() == [1, 1, 1] and not got["Hs_topk"].any() and not got["Cmass"].any()


def test_empty_batch():
    got = token_metrics(
        TopK.empty(0, 4), TopK.empty(0, 4), sampled_ids=[], student_logprobs=[], teacher_logprobs=[], response_lengths=[0, 0]
    )
    assert all(column.shape == (0,) for column in got.values())


def test_bad_input_is_named():
    topk = TopK.empty(3, 2)
    good = dict(sampled_ids=[1] * 3, student_logprobs=[0] * 3, teacher_logprobs=[0] * 3, response_lengths=[3])
    with pytest.raises(DataError, match="teacher top-k: expected 3 positions .* got 2"):
        token_metrics(topk, topk[:2], **good)
    with pytest.raises(DataError, match="K = 2, teacher has K = 4"):
        token_metrics(topk, TopK.empty(3, 4), **good)
    with pytest.raises(DataError, match="teacher_logprobs: expected 3"):
        token_metrics(topk, topk, **{**good, "teacher_logprobs": [0]})
    with pytest.raises(ConfigError, match="union_tail"):
        token_metrics(topk, topk, **good, support="jensen")
    with pytest.raises(DataError, match=r"teacher_at_student_ids: expected shape \(3, 2\)"):
        token_metrics(topk, topk, **good, teacher_at_student_ids=np.zeros((3, 1)))


def test_an_id_at_the_edge_of_two_rows_is_not_taken_for_shared():
    # Sorted by id, the last of row 0 is the student's 9 and the first of row 1 the teacher's 9.
    student = TopK.from_lists([[[-0.1, 9, None], [-3.0, 1, None]], [[-0.2, 30, None], [-2.0, 20, None]]], 2)
    teacher = TopK.from_lists([[[-0.1, 2, None], [-3.0, 1, None]], [[-0.2, 9, None], [-2.0, 20, None]]], 2)
    got = token_metrics(
        student, teacher, sampled_ids=[9, 9], student_logprobs=[0, 0], teacher_logprobs=[0, 0], response_lengths=[2]
    )
    np.testing.assert_allclose(got["Coverlap"], [0.5, 0.5])
    np.testing.assert_allclose(got["Cmass"], np.exp([-3.0, -2.0]), rtol=1e-6)


def test_responses_in_parts_give_the_same_columns_as_one_array():
    rng = np.random.default_rng(5)
    lengths, K = [700, 1, 0, 900], 4
    sides = [[TopK.from_arrays(rng.permuted(np.tile(np.arange(9, dtype=np.int32), (n, 1)), axis=1)[:, :K].copy(),
                               -np.sort(rng.exponential(1, (n, K)), axis=1)) for n in lengths] for _ in range(2)]  # fmt: skip
    T = sum(lengths)
    given = dict(sampled_ids=rng.integers(0, 9, T), student_logprobs=-rng.random(T), teacher_logprobs=-rng.random(T),
                 response_lengths=lengths, teacher_at_student_ids=np.where(rng.random((T, K)) < 0.9, -rng.random((T, K)), np.nan))  # fmt: skip
    whole = token_metrics(*(TopK.concat(parts) for parts in sides), **given)
    chained = token_metrics(*(TopKParts(parts) for parts in sides), **given)
    for name, column in whole.items():
        np.testing.assert_array_equal(chained[name], column, err_msg=name)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64, 257])
@pytest.mark.parametrize("columns", [0, 1, 2, 7, 8, 9, 33, 128, 200])
@pytest.mark.parametrize("layout", [np.ascontiguousarray, np.asfortranarray, lambda x: x[::-1, ::-1]])
def test_sums_run_from_left_to_right_to_the_last_bit(rows, columns, layout):
    rng = np.random.default_rng(rows * 1000 + columns)
    x_BU = layout(rng.random((rows, columns)) * 10.0 ** rng.integers(-12, 3, (rows, columns)))
    expected = []
    for row in x_BU.tolist():
        total = 0.0
        for value in row:
            total += value
        expected.append(total)
    assert ordered_sum(x_BU).tolist() == expected
