"""merge_banks and tools/merge_token_bank.py: inputs, types, idempotence, atomic output, bounded memory."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from test_token_bank import FORMATS, RELEASED, bank_columns, write_released_bank

from ta_opd.errors import DataError
from ta_opd.token_bank import TokenBankWriter, merge_banks, read_bank

TOOL = Path(__file__).parents[2] / "tools" / "merge_token_bank.py"


def bank(directory: Path, kind: str = "parquet", rollouts=(0, 1), rows: int = 5) -> Path:
    with TokenBankWriter(directory, kind, raw_topk=True) as writer:
        for rollout_id in rollouts:
            writer.write(rollout_id, bank_columns(rows, rollout_id))
    return directory


def run_tool(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_merges_into_every_format(tmp_path, kind, suffix):
    source = bank(tmp_path / "bank", kind)
    report = merge_banks([source], tmp_path / f"out.{suffix}")
    merged, plain = read_bank(tmp_path / f"out.{suffix}"), read_bank(source)
    assert list(merged) == [*RELEASED, "source_file", "source_dir"]
    numbers = RELEASED[:-4]
    pd.testing.assert_frame_equal(merged[numbers], plain[numbers], check_exact=True)
    for got, expected in zip(merged["teacher_top_logps"], plain["teacher_top_logps"], strict=True):
        np.testing.assert_array_equal(got, expected)
    assert merged["source_file"].tolist() == [f"rollout_000000.{kind}"] * 5 + [f"rollout_000001.{kind}"] * 5
    assert set(merged["source_dir"]) == {str(source)}
    valid, kept = (int(plain[name].sum()) for name in ("loss_mask_original", "budget_keep"))
    assert (report.files, report.rows, report.columns) == (2, 10, 65)
    assert (report.valid_tokens, report.kept_tokens) == (valid, kept) and report.keep_ratio == kept / valid


def test_a_second_run_reads_neither_its_own_output_nor_another_merge(tmp_path):
    source = bank(tmp_path / "bank")
    merge_banks([source], source / "merged.parquet")
    first = (source / "merged.parquet").read_bytes()
    merge_banks([source], source / "merged.parquet")
    assert (source / "merged.parquet").read_bytes() == first
    merge_banks([source], source / "all_tokens.parquet")  # another name: known by the mark in the file
    assert merge_banks([source], source / "merged.csv").rows == 10
    assert merge_banks([source], source / "merged.csv").rows == 10
    for _ in range(2):
        assert merge_banks([source / "*"], source / "rollout_all.parquet").rows == 10
    for name in ("rollout_all.csv", "rollout_all.jsonl"):
        assert merge_banks([source], source / name).rows == 10
    assert merge_banks([source], source / "merged.parquet").rows == merge_banks([source / "*"], source / "merged.parquet").rows == 10
    assert merge_banks([tmp_path / "*" / "merged.csv"], tmp_path / "again.csv").rows == 10  # asked for by its name
    assert len(read_bank(source)) == 10


def test_inputs_are_directories_patterns_and_files_each_once(tmp_path):
    one, two = bank(tmp_path / "one", "csv"), bank(tmp_path / "two", "jsonl", rollouts=(3,))
    (tmp_path / "link").symlink_to(one)
    inputs = [one, tmp_path / "link", str(tmp_path / "o*"), one / "rollout_000000.csv", str(two / "*.jsonl")]
    report = merge_banks(inputs, tmp_path / "out.parquet")
    assert (report.files, report.rows) == (3, 15)
    assert merge_banks([str(tmp_path / "t*")], tmp_path / "out.parquet").rows == 5


def test_nothing_to_merge_is_a_file_not_found_error(tmp_path):
    (tmp_path / "empty").mkdir()
    for inputs in ([tmp_path / "empty"], [tmp_path / "absent"], [str(tmp_path / "x*.csv")], []):
        with pytest.raises(FileNotFoundError, match="nothing to merge"):
            merge_banks(inputs, tmp_path / "out.parquet")
    source = bank(tmp_path / "bank")
    with pytest.raises(FileNotFoundError):
        merge_banks([source / "rollout_000000.parquet"], source / "rollout_000000.parquet")
    with pytest.raises(DataError, match=r"\.xlsx"):
        merge_banks([source], tmp_path / "out.xlsx")


def test_raw_topk_and_source_columns_can_be_left_out(tmp_path):
    source = bank(tmp_path / "bank", "csv")
    merge_banks([source], tmp_path / "out.parquet", drop_raw_topk=True, source_columns=False)
    assert pq.read_schema(tmp_path / "out.parquet").names == RELEASED[:-4]


def test_banks_of_the_released_code_and_ours_merge(tmp_path):
    write_released_bank(tmp_path / "old")
    bank(tmp_path / "new", "parquet")
    report = merge_banks([tmp_path / "old", tmp_path / "new"], tmp_path / "out.parquet")
    merged = read_bank(tmp_path / "out.parquet")
    assert report.rows == len(merged) == 18
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert [str(schema.field(name).type) for name in ("H_norm", "token_id", "student_top_ids")] == ["double", "int32", "string"]
    assert merged["student_name"].tolist()[:8] == ["7"] * 8  # a name is no number, even where its prefix looks like one


def test_unknown_columns_become_numbers_by_their_prefix_where_one_value_is_one(tmp_path):
    (tmp_path / "a.csv").write_text("token_id,teacher_x,note,D_y,mean_z,HH\n1,,5,no,1,\n2,oops,6,way,2.5,\n")
    (tmp_path / "b.csv").write_text("token_id,teacher_x,extra\n3.0,4,e\n")
    (tmp_path / "c.jsonl").write_text('{"token_id": 4, "extra": 7, "late": 1}\n{"token_id": 5, "mean_z": "3", "later": "q"}\n')
    report = merge_banks([tmp_path / "*.csv", tmp_path / "c.jsonl"], tmp_path / "out.parquet", source_columns=False)
    schema = pq.read_schema(tmp_path / "out.parquet")
    kinds = {field.name: str(field.type) for field in schema}
    assert kinds == {"token_id": "int32", "teacher_x": "double", "note": "string", "D_y": "string", "mean_z": "double",
                     "HH": "string", "extra": "string", "late": "int64", "later": "string"}  # fmt: skip
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert table["token_id"] == [1, 2, 3, 4, 5]
    assert table["teacher_x"] == [None, None, 4.0, None, None] and table["mean_z"] == [1.0, 2.5, None, None, 3.0]
    assert table["extra"] == [None, None, "e", "7", None] and report.columns == 9


def test_a_failed_merge_leaves_the_old_output_and_no_rubbish(tmp_path):
    source = bank(tmp_path / "bank", "csv")
    merge_banks([source], tmp_path / "out.parquet")
    before = (tmp_path / "out.parquet").read_bytes()
    with open(source / "rollout_000001.csv", "a") as file:
        file.write("1,2,3\n")
    with pytest.raises(DataError, match=r"rollout_000001\.csv"):
        merge_banks([source], tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "out.parquet"]


def test_the_tool_has_the_released_flags_and_prints_what_it_did(tmp_path):
    source = bank(tmp_path / "bank")
    done = run_tool(source, "--output", source / "merged.parquet", "--drop-raw-topk", "--no-source-cols")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"files: 2\nrows: 10\ncols: 59\nsaved: .*merged\.parquet\nvalid_tokens: \d+  keep_ratio: \d\.\d+", done.stdout
    )
    failed = run_tool(tmp_path / "absent", "--output", tmp_path / "out.csv")
    assert failed.returncode == 1 and "nothing to merge" in failed.stderr and "Traceback" not in failed.stderr


PEAK = """
    import json, resource, sys
    from ta_opd.token_bank import merge_banks
    report = merge_banks([sys.argv[1]], sys.argv[2], drop_raw_topk=True)
    print(json.dumps([report.rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def test_memory_of_a_merge_does_not_grow_with_the_bank(tmp_path):
    """Ten times the rows (some 80 MB more as arrays, 150 MB as text) may cost at most 40 MB more."""
    columns, sizes = bank_columns(10_000), {"small": 2, "large": 20}
    for name, rollouts in sizes.items():
        with TokenBankWriter(tmp_path / name, "parquet") as writer:
            for rollout_id in range(rollouts):
                writer.write(rollout_id, columns)
    for suffix in ("parquet", "csv"):
        peaks = {}
        for name, rollouts in sizes.items():
            arguments = [sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path / name), str(tmp_path / f"out.{suffix}")]
            rows, peaks[name] = json.loads(subprocess.run(arguments, check=True, capture_output=True, timeout=120).stdout)
            assert rows == rollouts * 10_000
        assert peaks["large"] - peaks["small"] < 40, peaks


def test_banks_that_an_editor_saved_in_another_encoding(tmp_path):
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbftok_pos,token_id\n0,5\n")
    assert read_bank(tmp_path / "bom.csv")["token_id"].tolist() == [5]
    assert read_bank(tmp_path / "bom.csv", ["tok_pos"])["tok_pos"].tolist() == [0]
    (tmp_path / "latin.csv").write_bytes(b"tok_pos,token_id,\xe9\n0,5,1\n")
    with pytest.raises(DataError, match="latin.csv: expected UTF-8 text"):
        merge_banks([tmp_path / "latin.csv"], tmp_path / "out.parquet")
