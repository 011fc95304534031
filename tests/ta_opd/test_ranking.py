"""Rankings against a plain sort: scores with many ties, both ways of breaking them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ta_opd.ranking import Order, Rows


@st.composite
def rankings(draw):
    """(order, free [T])."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    rows = Rows.of(lengths)
    total = sum(lengths)
    score_T = np.array(
        draw(st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0]), min_size=total, max_size=total)), np.float64
    )
    free_T = np.array(draw(st.lists(st.booleans(), min_size=total, max_size=total)), bool)
    return Order(score_T, rows, draw(st.booleans())), free_T


def sorted_rows(order: Order, rows) -> list[int]:
    """The definition: larger score, then earlier (later) position in the response, then the earlier row."""
    sign = -1 if order.late_first else 1
    return sorted(rows, key=lambda r: (-order.score[r], sign * order.rows.tok_pos[r], r))


@settings(max_examples=150, deadline=None)
@given(rankings(), st.integers(-1, 12))
def test_the_best_are_the_first_of_a_sort(case, count):
    order, free_T = case
    free_C = np.flatnonzero(free_T)
    assert sorted(order.best(free_C, count).tolist()) == sorted(sorted_rows(order, free_C.tolist())[: max(count, 0)])


@settings(max_examples=150, deadline=None)
@given(rankings())
def test_the_best_of_each_response(case):
    order, free_T = case
    want = []
    for sample in range(order.rows.response_lengths.size):
        own = sorted_rows(order, np.flatnonzero(free_T & (order.rows.sample == sample)).tolist())
        want += own[:1]
    assert order.best_of_each(free_T).tolist() == want


@settings(max_examples=150, deadline=None)
@given(rankings(), st.data())
def test_the_best_per_response(case, data):
    order, free_T = case
    num = order.rows.response_lengths.size
    counts_N = np.array(data.draw(st.lists(st.integers(0, 4), min_size=num, max_size=num)))
    want = []
    for sample in range(num):
        want += sorted_rows(order, np.flatnonzero(free_T & (order.rows.sample == sample)).tolist())[: counts_N[sample]]
    got = order.best_per_response(np.flatnonzero(free_T), counts_N)
    assert sorted(got.tolist()) == sorted(want)


@settings(max_examples=60, deadline=None)
@given(rankings())
def test_spans_and_counts(case):
    order, free_T = case
    rows = order.rows
    spans = rows.spans()
    assert [order.rows.sample[s].tolist() for s in spans] == [[i] * n for i, n in enumerate(rows.response_lengths.tolist()) if n]
    assert rows.count(free_T).tolist() == [int((free_T & (rows.sample == i)).sum()) for i in range(rows.response_lengths.size)]
