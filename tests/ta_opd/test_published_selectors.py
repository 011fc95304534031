"""The published rules of the field: each against its own check value or its formula by hand; the open registry."""

import math

import numpy as np
import pytest

from ta_opd.errors import ConfigError, DataError
from ta_opd.metrics import token_metrics
from ta_opd.selection import MASK_CHOICES, SelectionConfig, select_tokens
from ta_opd.selectors import Batch, Scored, get_selector, load_selector, register_selector, registry
from ta_opd.selectors.common import batch_rank, minmax
from ta_opd.selectors.ier import ier_of, ier_scores
from ta_opd.topk import TopK

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # nan, inf, division by zero
LENGTHS = np.array([5, 7])


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch):
    monkeypatch.setattr(registry, "_SELECTORS", dict(registry._SELECTORS))
    monkeypatch.setattr(registry, "_NAMES", dict(registry._NAMES))


def columns(**given) -> dict:
    rng = np.random.default_rng(5)
    names = ("Hs_topk_norm", "Hs_topk", "Ht_topk", "KLf_union", "KLr_union", "Cmass")
    made = {name: rng.random(12) for name in names}
    made["student_logp_sampled"] = -rng.exponential(1, 12)
    made["teacher_logp_sampled"] = -rng.exponential(1, 12)
    made |= {name: np.asarray(values, float) for name, values in given.items()}
    made["sampled_reverse_kl"] = made["student_logp_sampled"] - made["teacher_logp_sampled"]
    made["sampled_teacher_adv"] = -made["sampled_reverse_kl"]
    return made


def select(mask, metrics=None, valid=None, **options):
    valid = np.ones(12, bool) if valid is None else valid
    return select_tokens(metrics or columns(), valid, LENGTHS, SelectionConfig(mask=mask, **options))


def kept(selection) -> list[int]:
    return np.flatnonzero(selection.keep).tolist()


def test_ier_published_check_value():
    p, rho = np.array([[1 / 2, 1 / 3, 1 / 6]]), np.array([[0.0, 1.0, 2.0]])
    assert ier_of(p, rho)[0] == pytest.approx(10 / 13, rel=1e-12)
    assert ier_of(p, rho + 5)[0] == pytest.approx(10 / 13, rel=1e-12)
    assert ier_of(np.array([[0.0, 1 / 2, 1 / 3, 1 / 6]]), np.array([[9.0, 0, 1, 2]]))[0] == pytest.approx(10 / 13, rel=1e-12)


def ier_by_hand(student: dict, teacher: dict) -> float:
    support = sorted(set(student) | set(teacher))
    logs = [[side.get(v, -12.0) for v in support] for side in (student, teacher)]
    p = [math.exp(x) / sum(map(math.exp, logs[0])) for x in logs[0]]
    rho = [min(max(a - b, -30), 30) for a, b in zip(*logs, strict=True)]
    noise = [(1 - x) / x for x in p]

    def mean(values):
        return sum(x * y for x, y in zip(p, values, strict=True))

    variance = mean([r * r for r in rho]) - mean(rho) ** 2
    center = mean([r * n for r, n in zip(rho, noise, strict=True)]) / mean(noise)
    return variance / (mean([(r - center) ** 2 * n for r, n in zip(rho, noise, strict=True)]) - variance)


@pytest.mark.parametrize("sampled, extra", [(1, False), (40, True)])
def test_ier_on_a_union_with_the_sampled_token(sampled, extra):
    student = {1: math.log(0.6), 2: math.log(0.2), 3: math.log(0.1)}
    teacher = {2: math.log(0.7), 9: math.log(0.2), 1: math.log(0.05)}
    sides = [TopK.from_lists([[[lp, i, None] for i, lp in side.items()]], 3) for side in (student, teacher)]
    at_student, at_teacher = (math.log(0.03), math.log(0.002)) if extra else (student[1], teacher[1])
    metrics = token_metrics(
        *sides, sampled_ids=[sampled], student_logprobs=[at_student], teacher_logprobs=[at_teacher], response_lengths=[1]
    )
    selection = select_tokens(
        metrics, [1], [1], SelectionConfig(mask="ier", ratio=0.5), student=sides[0], teacher=sides[1], sampled_ids=[sampled]
    )
    expected = ier_by_hand({**student, sampled: at_student}, {**teacher, sampled: at_teacher})
    assert selection.columns["budget_score"][0] == pytest.approx(expected, rel=1e-5)


def test_ier_needs_the_top_k_and_says_so():
    with pytest.raises(DataError, match="pass student=, teacher=, sampled_ids="):
        select("ier", ratio=0.5)


def test_ier_fusions():
    rng = np.random.default_rng(1)
    sides = [TopK(np.argsort(rng.random((12, 9)), 1)[:, :3].astype(np.int32), np.log(rng.dirichlet(np.ones(3), 12))) for _ in "st"]
    metrics = token_metrics(
        *sides, sampled_ids=np.zeros(12), student_logprobs=-np.ones(12), teacher_logprobs=-np.ones(12), response_lengths=[12]
    )
    inputs = dict(student=sides[0], teacher=sides[1], sampled_ids=np.zeros(12, int))
    out = {m: select_tokens(metrics, np.ones(12), [12], SelectionConfig(mask=m, ratio=0.5), **inputs).columns for m in
           ("ier", "tip_ier_or", "tip_ier_and")}  # fmt: skip
    rank = np.argsort(np.argsort(out["ier"]["budget_score"])) / 11
    u = out["ier"]["tip_score"]
    np.testing.assert_allclose(out["tip_ier_or"]["budget_score"], 1 - (1 - u) * (1 - rank))
    np.testing.assert_allclose(out["tip_ier_and"]["budget_score"], u * rank)


def test_tip_uses_reverse_kl_minmax_and_a_floor_per_response():
    entropy, reverse = np.linspace(0, 1, 12), np.tile([0.0, 4.0], 6)
    selection = select("tip_opd", columns(Hs_topk_norm=entropy, KLr_union=reverse), ratio=0.5, min_keep=0)
    ceiling = np.quantile(entropy, 0.98)
    h, d = np.minimum(entropy, ceiling) / ceiling, reverse / 4
    np.testing.assert_allclose(selection.columns["budget_score"], h + d - h * d)
    counts = np.add.reduceat(selection.keep, [0, 5])
    assert counts.tolist() == [2, 3] and selection.budget == 5
    assert select("tip_opd", scope="batch", rounding="ceil", ratio=0.5).budget == 6


def test_tip_q3():
    metrics = columns()
    expected = metrics["KLf_union"] * (1 - np.minimum(metrics["Hs_topk_norm"], np.quantile(metrics["Hs_topk_norm"], 0.98)))
    np.testing.assert_allclose(select("tip_q3", metrics, ratio=0.5).columns["budget_score"], expected)


def test_dial():
    metrics = columns()
    p, q = np.exp(metrics["student_logp_sampled"]), np.exp(metrics["teacher_logp_sampled"])
    selection = select("dial", metrics, ratio=0.4)
    np.testing.assert_allclose(selection.columns["budget_score"], np.abs(q - p))
    assert np.add.reduceat(selection.keep, [0, 5]).tolist() == [2, 3]
    from ta_opd.selectors.dial import dial_score

    np.testing.assert_allclose(dial_score(metrics, 0.0), np.abs(np.log(q / p)))
    np.testing.assert_allclose(dial_score(metrics, 0.5), np.sqrt(np.abs(np.log(q / p)) * np.abs(q - p)))


def test_sampled_reverse_kl_both_ways_leaves_unknown_tokens_out():
    metrics = columns()
    metrics["sampled_reverse_kl"][3] = np.nan
    ranked = [i for i in np.argsort(metrics["sampled_reverse_kl"]) if i != 3]
    assert kept(select("sampled_rkl_max", metrics, ratio=0.25, min_keep=0)) == sorted(ranked[-3:])
    assert kept(select("sampled_rkl_min", metrics, ratio=0.25, min_keep=0)) == sorted(ranked[:3])
    assert len(kept(select("sampled_rkl_max", metrics, ratio=1.0))) == 11


def test_prefix_takes_the_first_valid_tokens():
    valid = np.ones(12, bool)
    valid[[0, 6]] = False
    assert kept(select("prefix", valid=valid, ratio=0.5)) == [1, 2, 5, 7, 8]
    assert kept(select("position", valid=valid, ratio=0.5)) == [1, 2, 5, 7, 8]


def test_sure_weights():
    metrics = columns()
    p = np.exp(metrics["student_logp_sampled"])
    selection = select("sure", metrics, ratio=1.0)
    np.testing.assert_allclose(selection.weights, 2 - p, rtol=1e-6)
    half = select("sure", metrics, ratio=0.5, min_keep=0)
    assert kept(half) == sorted(np.argsort(p)[:6].tolist()) and (half.weights[~half.keep] == 0).all()


def test_iw_opd_weights_fall_from_one_and_a_half_to_one():
    gaps = [1.0, 1, 2, 0, 4] + [0.5] * 7
    metrics = columns(teacher_logp_sampled=np.zeros(12), student_logp_sampled=gaps)
    weights = select("iw_opd", metrics, ratio=1.0).weights
    np.testing.assert_allclose(weights[:5], 1 + 0.5 * (1 - np.array([0, 1, 2, 4, 4]) / 8), rtol=1e-6)
    np.testing.assert_allclose(weights[5:], 1 + 0.5 * (1 - np.arange(7) / 7), rtol=1e-6)
    same = select("iw_opd", columns(teacher_logp_sampled=np.zeros(12), student_logp_sampled=np.zeros(12)), ratio=1.0)
    np.testing.assert_allclose(same.weights, 1.5)


def test_weights_apply_at_ratio_one_in_both_profiles():
    for profile in ("paper", "released"):
        assert select("sure", ratio=1.0, profile=profile).weights.max() > 1
    assert SelectionConfig(mask="q3", profile="released").keeps_everything
    assert not SelectionConfig(mask="q3").keeps_everything and SelectionConfig(mask="full").keeps_everything


def test_fire_drops_unlikely_responses_and_normalises_the_weights():
    rng = np.random.default_rng(0)
    T, lengths = 50, [5] * 10
    metrics = {name: rng.random(T) for name in ("Hs_topk_norm", "KLf_union", "Cmass", "Hs_topk", "Ht_topk")}
    metrics["teacher_logp_sampled"] = -np.repeat(np.arange(10.0), 5)
    selection = select_tokens(metrics, np.ones(T), lengths, SelectionConfig(mask="fire"))
    assert selection.keep.reshape(10, 5).all(axis=1).tolist() == [True] * 8 + [False] * 2
    raw = (2 - metrics["Ht_topk"] / metrics["Ht_topk"].max()) * (1 + metrics["Hs_topk"] / metrics["Hs_topk"].max())
    np.testing.assert_allclose(selection.weights[:40], raw[:40] / raw[:40].mean(), rtol=1e-5)
    assert selection.weights[:40].mean() == pytest.approx(1, rel=1e-5) and not selection.weights[40:].any()


def test_fire_with_masked_tokens_of_larger_entropy_than_all_others():
    """They are no targets, so their weights are not used; they must not turn negative either."""
    rng = np.random.default_rng(0)
    metrics = {name: rng.random(50) for name in ("Hs_topk_norm", "KLf_union", "Cmass", "Hs_topk", "Ht_topk", "teacher_logp_sampled")}
    valid = np.arange(50) % 5 > 0
    expected = select_tokens(metrics, valid, [5] * 10, SelectionConfig(mask="fire")).weights
    for name in ("Hs_topk", "Ht_topk"):
        metrics[name] = np.where(valid, metrics[name], 9.0)
    np.testing.assert_array_equal(select_tokens(metrics, valid, [5] * 10, SelectionConfig(mask="fire")).weights, expected)


def test_sparse_supervision_keeps_one_or_two_tokens_of_every_response():
    metrics = columns()
    adv = metrics["sampled_teacher_adv"]
    best, worst = [adv[:5].argmax(), 5 + adv[5:].argmax()], [adv[:5].argmin(), 5 + adv[5:].argmin()]
    assert kept(select("mintok", metrics)) == best and kept(select("maxtok", metrics)) == worst
    assert kept(select("minmaxtok", metrics)) == sorted(best + worst)
    assert np.add.reduceat(select("rand1tok", metrics).keep, [0, 5]).tolist() == [1, 1]


def test_minmax_and_rank_helpers():
    valid = np.array([True, True, True, True, False])
    np.testing.assert_allclose(minmax(np.array([1.0, 3, 2, 2, 99]), valid), [0, 1, 0.5, 0.5, 1])
    np.testing.assert_allclose(batch_rank(np.array([1.0, 3, 2, 2, 99]), valid), [0, 1, 0.5, 0.5, 0])
    assert not minmax(np.ones(5), valid).any()


def test_recipes_hold_in_paper_profile_and_flags_win():
    config = SelectionConfig(mask="tip_opd", ratio=0.5)
    assert (config.scope, config.rounding) == ("response", "floor")
    assert SelectionConfig(mask="tip_opd", ratio=0.5, scope="batch").scope == "batch"
    assert SelectionConfig(mask="tip_opd", ratio=0.5, profile="released").scope == "batch"


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "my_rule.py"
    path.write_text(
        "import numpy as np\n"
        "from ta_opd.selectors import Batch, Scored, register_selector\n\n"
        "@register_selector('surprise', paper='mine', direction='low', replace=True)\n"
        "def surprise(batch: Batch) -> np.ndarray:\n"
        "    return batch['teacher_logp_sampled']\n\n"
        "def plain(batch):\n"
        "    return batch['H_norm'] * batch['C_norm']\n"
    )
    return path


def test_own_selector_from_a_path(own_file):
    metrics = columns()
    selection = select("none", metrics, ratio=0.25, min_keep=0, selector_path=f"{own_file}:surprise")
    assert kept(selection) == sorted(np.argsort(metrics["teacher_logp_sampled"])[:3].tolist())
    assert set(selection.columns["budget_method"]) == {f"{own_file}:surprise"}
    plain = select("none", metrics, ratio=0.25, min_keep=0, selector_path=f"{own_file}:plain")
    scores = plain.columns["H_norm"] * plain.columns["C_norm"]
    assert kept(plain) == sorted(np.argsort(-scores, kind="stable")[:3].tolist())
    assert load_selector(f"{own_file}:plain").name not in MASK_CHOICES


def test_own_selector_from_a_module():
    assert load_selector("ta_opd.selectors.dial:dial") is get_selector("dial")


@pytest.mark.parametrize(
    "path, message",
    [
        ("nothing", "package.module:function"),
        ("ta_opd.selectors.dial:nothing", "no function 'nothing'"),
        ("no_such_package_x:f", "cannot import"),
        ("/no/such/file.py:f", "no file"),
    ],
)
def test_bad_paths_are_named(path, message):
    with pytest.raises(ConfigError, match=message):
        SelectionConfig(selector_path=path)


def test_own_selectors_are_checked():
    def register(name, answer):
        register_selector(name, replace=True)(lambda batch: answer)

    register("test_short", np.zeros(3))
    with pytest.raises(DataError, match="a score for each of 12 tokens, got shape .3,."):
        select("test_short", ratio=0.5)
    register("test_nan", np.full(12, np.nan))
    with pytest.raises(DataError, match="12 of 12 scores are NaN"):
        select("test_nan", ratio=0.5)
    register("test_weights", Scored(np.zeros(12), weights=np.full(12, np.nan)))
    with pytest.raises(DataError, match="weights are NaN"):
        select("test_weights", ratio=0.5)
    register("test_weights", Scored(np.zeros(12), weights=np.append(np.ones(11), -1)))
    with pytest.raises(DataError, match="not negative, got -1.0 to 1.0"):
        select("test_weights", ratio=0.5)
    with pytest.raises(ConfigError, match="'tip' is taken"):
        register_selector("mine", aliases=("tip",))(lambda batch: None)
    with pytest.raises(ConfigError, match="high, low"):
        register_selector("mine", direction="up")


def test_batch_offers_raw_top_k():
    seen = {}

    @register_selector("test_looks", replace=True)
    def looks(batch: Batch):
        """For this test."""
        seen["k"] = batch.topk()[0].K
        return ier_scores(batch)

    topk = TopK.from_lists([[[-0.1, 3, None], [-3.0, 5, None]]] * 2, 4)
    metrics = token_metrics(topk, topk, sampled_ids=[3, 3], student_logprobs=[-1, -1], teacher_logprobs=[-1, -1], response_lengths=[2])
    select_tokens(metrics, [1, 1], [2], SelectionConfig(mask="test_looks", ratio=0.5), student=topk, teacher=topk, sampled_ids=[3, 3])
    assert seen["k"] == 4
