import pandas as pd
import pytest

from ta_opd.errors import DataError
from ta_opd.fixed_context.tables import read_meta, read_table, to_markdown, write_table


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_round_trip_with_record(tmp_path, suffix):
    frame = pd.DataFrame({"a": [1, 2], "b": [0.5, None], "c": ["x", "[1, 2]"]})
    path = write_table(tmp_path / f"t{suffix}", frame, {"topk": [16, 8]})
    back = read_table(path)
    assert back["a"].tolist() == [1, 2] and back["c"].tolist() == ["x", "[1, 2]"] and back["b"].isna().tolist() == [False, True]
    assert read_meta(path) == {"topk": [16, 8]}
    assert not list(tmp_path.glob("*.partial"))


def test_a_parquet_file_cut_off(tmp_path):
    path = write_table(tmp_path / "t.parquet", pd.DataFrame({"a": range(1000)}))
    path.write_bytes(path.read_bytes()[:-100])
    for read in (read_table, read_meta):
        with pytest.raises(DataError, match="cut off"):
            read(path)


@pytest.mark.parametrize("name, content, message", [("t.txt", "x", "name ending in"), ("t.csv", "a,b\n", "got none"), ("t.jsonl", "{", "cannot be read")])
def test_unreadable(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / name)


def test_missing_file_and_missing_column(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "absent.parquet")
    write_table(tmp_path / "t.csv", pd.DataFrame({"a": [1]}))
    with pytest.raises(DataError, match="expected columns b"):
        read_table(tmp_path / "t.csv", ["a", "b"])


def test_markdown_escapes_and_leaves_nan_empty():
    text = to_markdown(pd.DataFrame({"name": ["a|b"], "x": [float("nan")], "y": [0.123456]}))
    assert text.splitlines()[2] == "| a\\|b |  | 0.1235 |"


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_every_format_keeps_text_as_text_and_all_digits(tmp_path, suffix):
    frame = pd.DataFrame({
        "prompt": ["NA", "null", "a\r\nb\u2028c"], "label": ["007", "1.50", "3"], "prompt_id": ["1234567890123456", "0123", "45"],
        "KLf_full": [1.2345678901234567e-13, 1 / 3, None], "G_KLf": [1e300, 5e-324, -2 / 3], "none": [None, None, None], "sample_index": [2**60, 1, 2],
    })  # fmt: skip
    back = read_table(write_table(tmp_path / f"t{suffix}", frame))
    for name in ("prompt", "label", "prompt_id", "G_KLf", "sample_index"):
        assert back[name].tolist() == frame[name].tolist(), name
    assert back["KLf_full"].tolist()[:2] == frame["KLf_full"].tolist()[:2] and back["KLf_full"].isna().tolist() == [False, False, True]
    assert back["KLf_full"].dtype == float and back["none"].isna().all()


def test_markdown_stays_on_its_line():
    assert to_markdown(pd.DataFrame({"prompt": ["a\nb\r\nc"]})).splitlines()[2] == "| a b c |"


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_numbers_stay_numbers_where_banks_have_text_of_that_name(tmp_path, suffix):
    """loss_mask is a list in a context bank and a number in scores; quadrants come as names or as codes."""
    scores = read_table(write_table(tmp_path / f"s{suffix}", pd.DataFrame({"loss_mask": [1, 0], "quadrant": [3, 1], "reach": [True, False]})))
    assert scores["loss_mask"].tolist() == [1, 0] and (scores["quadrant"] == 3).tolist() == [True, False] and scores["reach"].dtype == bool
    bank = read_table(write_table(tmp_path / f"b{suffix}", pd.DataFrame({"loss_mask": ["[1]", "[1, 0]"], "quadrant": ["Q3_lowH_highD", "Q1_highH_highD"]})))
    assert bank["loss_mask"].tolist() == ["[1]", "[1, 0]"] and bank["quadrant"].iloc[0] == "Q3_lowH_highD"
