"""Rollouts on disk: where they go, and that the diagnostic reads them from where slime's users look."""

import numpy as np
import pytest

from slime.rollout.dump import dump_path, dump_rollout
from slime.utils.types import Sample
from ta_opd.errors import ConfigError
from ta_opd.fixed_context.dumps import dump_files, read_dump


def samples() -> list[Sample]:
    return [Sample(index=7, group_index=3, prompt="1+1=", tokens=[5, 6, 8, 9], response_length=2, opd_weights=np.array([0, 1], np.float32)),
            Sample(index=8, group_index=3, prompt="1+1=", tokens=[5, 6], response_length=0)]  # fmt: skip


@pytest.mark.parametrize(("given", "written"), [
    ("dumps", "dumps/rollout_000012.parquet"),
    ("dumps/{rollout_id}", "dumps/12/rollout_000012.parquet"),
    ("dumps/{rollout_id}.parquet", "dumps/12.parquet"),
    ("dumps/r{rollout_id:04d}.pt", "dumps/r0012.parquet"),
])  # fmt: skip
def test_where_a_rollout_goes_and_that_it_is_read_from_there(tmp_path, given, written):
    path = dump_rollout(str(tmp_path / given), 12, samples())
    assert path == tmp_path / written and [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    rows = list(read_dump(path))
    assert [(r["rollout_id"], r["sample_index"], r["response_length"], r["tokens"]) for r in rows] == [(12, 7, 2, [5, 6, 8, 9]), (12, 8, 0, [5, 6])]


def test_the_diagnostic_finds_dumps_by_the_name_that_slime_would_have_written(tmp_path):
    for rollout_id in (0, 10, 2):
        dump_rollout(str(tmp_path / "{rollout_id}.pt"), rollout_id, samples())
    assert [p.name for p in dump_files([str(tmp_path / "*.pt")])] == ["0.parquet", "2.parquet", "10.parquet"]


@pytest.mark.parametrize("path", ["dumps/{step}.parquet", "dumps/{0}.parquet", "dumps/{.parquet", "dumps/all.parquet", "dumps/all.pt"])
def test_a_path_that_cannot_hold_every_rollout_is_refused(path):
    with pytest.raises(ConfigError, match="--save-debug-rollout-data: expected"):
        dump_path(path, 0)
