"""The token bank: columns, formats, resume, crashes, errors, and banks of the released code."""

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import orjson
import pandas as pd
import pyarrow.parquet as pq
import pytest

from ta_opd.errors import ConfigError, DataError, ServiceError
from ta_opd.token_bank import COLUMNS, QUADRANTS, TokenBankWriter, build_table, read_bank, writer
from ta_opd.token_bank.columns import COLUMN_TABLE

RELEASED = """schema_version pair_id teacher_name student_name seed rollout_id sample_index group_index sample_ordinal tok_pos
pos_norm prompt_len resp_len total_len truncated token_id student_logp_sampled teacher_logp_sampled sampled_reverse_kl
sampled_teacher_adv student_top1_id teacher_top1_id student_top1_prob teacher_top1_prob student_topk_mass teacher_topk_mass
Hs_topk Ht_topk Hs_topk_norm Ht_topk_norm KLf_union KLr_union Cmass Cmass_topk Cmass_true Cmass_exact Coverlap CBC Cprefix_ema
reach_t1 target_in_student_topk target_in_teacher_topk target_student_rank target_teacher_rank loss_mask_original H_norm D_norm
C_norm DC_norm Dlearn Dincompat tip_score ca_softor_score split_ca_score quadrant budget_method budget_ratio budget_score
budget_keep student_top_ids student_top_logps teacher_top_ids teacher_top_logps""".split()
FORMATS = ("parquet", "csv", "jsonl")


def bank_columns(rows: int, seed: int = 0, k: int = 4) -> dict:
    """Columns as tip_compat hands them over, with every kind of "none" in them."""
    rng = np.random.default_rng(seed)
    columns: dict = {"pair_id": "pair,1", "teacher_name": np.array(["a", "b"], object)[rng.integers(0, 2, rows)]}
    columns |= {"student_name": "", "seed": None, "budget_method": "tip", "budget_ratio": np.broadcast_to(0.1, (rows,))}
    columns["quadrant"] = rng.integers(1, 5, rows).astype(np.int8)
    for name in ("student", "teacher"):
        ids = rng.integers(0, 99, (rows, k)).astype(np.int32)
        logps = rng.normal(-3, 1, (rows, k))
        ids[::3, k // 2 :], logps[::3, k // 2 :] = -1, -np.inf
        columns |= {f"{name}_top_ids": ids, f"{name}_top_logps": logps}
        columns[f"{name}_top1_id"] = np.where(np.arange(rows) % 5 == 0, -1, 7).astype(np.int32)
        columns[f"target_{name}_rank"] = rng.integers(0, 4, rows).astype(np.int32)
    for column in COLUMN_TABLE:
        if column.name in columns or column.name in ("rollout_id", "schema_version"):
            continue
        if str(column.type) == "double":
            columns[column.name] = rng.random(rows)
        else:
            columns[column.name] = rng.integers(0, 2, rows)
    columns["Cmass_true"][::2] = np.nan
    columns["sampled_reverse_kl"][::4] = np.nan
    columns["sample_index"] = np.where(np.arange(rows) % 7 == 0, np.nan, np.arange(rows))
    return columns


def one_file(directory: Path) -> Path:
    (path,) = directory.glob("rollout_*")
    return path


def test_columns_are_the_released_ones_in_order():
    assert len(COLUMNS) == 63
    assert list(COLUMNS) == RELEASED
    assert build_table({"token_id": np.arange(3)}).schema.names == RELEASED


def test_the_three_formats_read_alike(tmp_path):
    columns = bank_columns(50)
    banks = {}
    for kind in FORMATS:
        with TokenBankWriter(tmp_path / kind, kind, raw_topk=True) as bank:
            bank.write(3, columns)
        banks[kind] = read_bank(tmp_path / kind)
    assert banks["parquet"].shape == (50, 63)
    for kind in ("csv", "jsonl"):
        numbers = [name for name in RELEASED if not name.endswith(("_top_ids", "_top_logps"))]
        pd.testing.assert_frame_equal(banks[kind][numbers], banks["parquet"][numbers], check_exact=True)
        for name in RELEASED[-4:]:
            for got, expected in zip(banks[kind][name], banks["parquet"][name], strict=True):
                np.testing.assert_array_equal(got, expected)
    read = banks["csv"]
    np.testing.assert_array_equal(read["KLf_union"], columns["KLf_union"])
    np.testing.assert_array_equal(read["student_top_ids"][0], columns["student_top_ids"][0][:2])
    assert read["quadrant"].tolist() == [QUADRANTS[code - 1] for code in columns["quadrant"]]
    assert read["target_student_rank"].isna().sum() == (columns["target_student_rank"] == 0).sum()
    assert (read["rollout_id"] == 3).all() and (read["schema_version"] == 1).all()


def test_csv_cells_are_formatted_as_released(tmp_path):
    columns = bank_columns(10)
    with TokenBankWriter(tmp_path, "csv") as bank:
        bank.write(0, columns)
    with open(one_file(tmp_path), newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == RELEASED
    assert rows[0]["student_top1_id"] == "" and rows[1]["student_top1_id"] == "7"
    assert rows[0]["Cmass_true"] == "" and float(rows[1]["Cmass_true"]) == columns["Cmass_true"][1]
    assert rows[0]["seed"] == "" and rows[0]["student_top_ids"] == ""
    assert rows[0]["pair_id"] == "pair,1"
    assert rows[0]["quadrant"] in QUADRANTS and rows[0]["budget_method"] == "tip"
    assert rows[0]["loss_mask_original"] in ("0", "1") and rows[0]["tok_pos"] in ("0", "1")
    assert [float(row["KLf_union"]) for row in rows] == columns["KLf_union"].tolist()


def test_raw_topk_is_json_text_in_csv_and_lists_in_parquet(tmp_path):
    columns = bank_columns(6)
    for kind in ("csv", "parquet"):
        with TokenBankWriter(tmp_path / kind, kind, raw_topk=True) as bank:
            bank.write(0, columns)
    with open(one_file(tmp_path / "csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert json.loads(rows[0]["student_top_ids"]) == columns["student_top_ids"][0][:2].tolist()
    assert json.loads(rows[1]["teacher_top_logps"]) == columns["teacher_top_logps"][1].tolist()
    assert (
        pq.read_table(one_file(tmp_path / "parquet"))["student_top_ids"].to_pylist()[1] == columns["student_top_ids"][1].tolist()
    )


def test_a_full_block_of_raw_topk_is_cut_at_its_rows(tmp_path):
    columns = bank_columns(5)
    columns["student_top_ids"] = np.arange(20, dtype=np.int32).reshape(5, 4)
    columns["student_top_logps"] = np.linspace(-9, -0.1, 20).reshape(5, 4)
    with TokenBankWriter(tmp_path, "csv", raw_topk=True) as bank:
        bank.write(0, columns)
    read = read_bank(tmp_path)
    np.testing.assert_array_equal(np.stack(read["student_top_ids"]), columns["student_top_ids"])
    np.testing.assert_array_equal(np.stack(read["student_top_logps"]), columns["student_top_logps"])


def test_files_are_keyed_by_the_rollout_id_and_a_rerun_replaces(tmp_path):
    with TokenBankWriter(tmp_path, "csv") as bank:
        for rollout_id in (0, 1, 2):
            bank.write(rollout_id, bank_columns(5, rollout_id))
    with TokenBankWriter(tmp_path, "csv") as bank:  # resumed from the checkpoint after rollout 0
        for rollout_id in (1, 2, 3):
            bank.write(rollout_id, bank_columns(8, 10 + rollout_id))
    assert sorted(path.name for path in tmp_path.glob("rollout_*")) == [f"rollout_00000{i}.csv" for i in range(4)]
    read = read_bank(tmp_path)
    assert read.groupby("rollout_id").size().to_dict() == {0: 5, 1: 8, 2: 8, 3: 8}
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert summary["rollout_id"].tolist() == [0, 1, 2, 3]
    assert summary["num_tokens"].tolist() == [5, 8, 8, 8]


def test_a_resume_in_another_format_does_not_double_a_rollout(tmp_path):
    for kind in ("csv", "parquet"):
        with TokenBankWriter(tmp_path, kind) as bank:
            bank.write(4, bank_columns(5))
    assert one_file(tmp_path).suffix == ".parquet"
    assert len(read_bank(tmp_path)) == 5


def test_summary_has_the_released_columns_and_means_over_valid(tmp_path):
    columns = bank_columns(40)
    with TokenBankWriter(tmp_path) as bank:
        bank.write(7, columns)
    (row,) = pd.read_csv(tmp_path / "summary.csv").to_dict("records")
    valid = columns["loss_mask_original"] == 1
    assert list(row) == [
        "rollout_id", "num_tokens", "num_valid_tokens", "num_kept_tokens", "keep_ratio", "mean_H_norm", "mean_D_norm",
        "mean_C_norm", "mean_tip_score", "mean_ca_softor_score", "mean_reach_t1", "q3_tokens", "budget_method", "budget_ratio",
    ]  # fmt: skip
    assert (row["rollout_id"], row["num_tokens"], row["num_valid_tokens"]) == (7, 40, valid.sum())
    assert row["num_kept_tokens"] == columns["budget_keep"].sum()
    assert row["mean_D_norm"] == pytest.approx(columns["D_norm"][valid].mean(), abs=1e-15)
    assert row["q3_tokens"] == ((columns["quadrant"] == 3) & valid).sum()
    assert (row["budget_method"], row["budget_ratio"]) == ("tip", 0.1)


def test_doubled_summary_rows_of_an_old_bank_are_repaired(tmp_path):
    with TokenBankWriter(tmp_path, "csv") as bank:
        bank.write(0, bank_columns(5))
    lines = (tmp_path / "summary.csv").read_text().splitlines()
    (tmp_path / "summary.csv").write_text("\n".join([*lines, lines[-1].replace("0,5,", "0,9,", 1)]) + "\n")
    with TokenBankWriter(tmp_path, "csv") as bank:
        bank.write(1, bank_columns(6))
    assert pd.read_csv(tmp_path / "summary.csv")["num_tokens"].tolist() == [9, 6]


def test_a_summary_that_a_crash_left_behind_is_made_up_from_the_files(tmp_path):
    with TokenBankWriter(tmp_path) as bank:
        bank.write(0, bank_columns(5))
        bank.write(1, bank_columns(6))
    whole = (tmp_path / "summary.csv").read_text()
    time.sleep(0.02)
    os.utime(tmp_path / "rollout_000000.parquet")  # rewritten after the summary: its row is stale
    (tmp_path / "summary.csv").write_text("".join(whole.splitlines(True)[:2]).replace("0,5,", "0,4,", 1))
    os.utime(tmp_path / "summary.csv", (1, 1))
    TokenBankWriter(tmp_path).close()
    assert (tmp_path / "summary.csv").read_text() == whole


def test_config_is_complete_and_remembers_what_it_replaced(tmp_path):
    with TokenBankWriter(tmp_path, config={"opd_budget_mask": "tip", "seed": 1, "resolved": {"min_keep": 2}}) as bank:
        bank.write(0, bank_columns(3))
    with TokenBankWriter(tmp_path, config={"opd_budget_mask": "tip", "seed": 1, "resolved": {"min_keep": 2}}):
        pass
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["schema_version"] == 1 and config["resolved"] == {"min_keep": 2} and config["earlier"] == []
    with TokenBankWriter(tmp_path, config={"opd_budget_mask": "entropy", "seed": 2}):
        pass
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["opd_budget_mask"] == "entropy"
    assert [(old["opd_budget_mask"], old["rollout_ids"]) for old in config["earlier"]] == [("tip", [0])]
    metadata = pq.read_schema(one_file(tmp_path)).metadata
    assert json.loads(metadata[b"ta_opd.config"])["seed"] == 1


def test_bad_columns_are_refused_at_once(tmp_path):
    with TokenBankWriter(tmp_path) as bank:
        with pytest.raises(DataError, match="H_norm has 4 rows, but token_id has 3"):
            bank.write(0, {"token_id": np.arange(3), "H_norm": np.zeros(4)})
        with pytest.raises(DataError, match="unknown columns.*'Hnorm'"):
            bank.write(0, {"token_id": np.arange(3), "Hnorm": np.zeros(3)})
        with pytest.raises(DataError, match="rollout id"):
            bank.write(-1, {"token_id": np.arange(3)})
    with pytest.raises(ConfigError, match="parquet, csv, jsonl"):
        TokenBankWriter(tmp_path, "xlsx")
    with pytest.raises(ServiceError, match="closed"):
        bank.write(0, {"token_id": np.arange(3)})


def test_an_error_of_the_thread_surfaces_and_does_not_hang(tmp_path):
    bank = TokenBankWriter(tmp_path / "bank")
    for path in (tmp_path / "bank").iterdir():
        path.unlink()
    (tmp_path / "bank").rmdir()
    bank.write(0, bank_columns(3))
    with pytest.raises(ServiceError, match="a rollout was not written"):
        bank.flush()
    (tmp_path / "bank").mkdir()
    bank.write(1, bank_columns(3))  # the writer itself lives on
    bank.close()
    assert len(read_bank(tmp_path / "bank")) == 3
    bank.close()


def test_writing_is_off_the_callers_path_and_bounded(tmp_path, monkeypatch):
    gate, started = threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        started.set()
        assert gate.wait(30)
        return build_table(*args, **kwargs)

    monkeypatch.setattr(writer, "build_table", slow)
    bank = TokenBankWriter(tmp_path, queue_size=1)
    columns = bank_columns(3)
    bank.write(0, columns)
    assert started.wait(30)
    bank.write(1, columns)  # waits in the queue
    third = threading.Thread(target=bank.write, args=(2, columns))
    third.start()
    third.join(0.2)
    assert third.is_alive() and not list(tmp_path.glob("rollout_*"))  # the queue is full: the third caller waits
    gate.set()
    third.join(30)
    bank.close()
    assert len(read_bank(tmp_path)) == 9


def test_a_writer_that_was_never_closed_still_writes_at_exit(tmp_path):
    code = f"""
        import numpy as np
        from ta_opd.token_bank import TokenBankWriter
        bank = TokenBankWriter({str(tmp_path)!r}, "csv")
        bank.write(5, {{"token_id": np.arange(20000)}})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
    assert len(read_bank(tmp_path)) == 20000


@pytest.mark.parametrize("kind", FORMATS)
def test_a_killed_writer_leaves_whole_files_only(tmp_path, kind):
    rows = 3000
    code = f"""
        import itertools, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_token_bank import bank_columns
        from ta_opd.token_bank import TokenBankWriter
        bank, columns = TokenBankWriter({str(tmp_path)!r}, {kind!r}, raw_topk=True), bank_columns({rows})
        for rollout_id in itertools.count():
            bank.write(rollout_id % 4, columns)
            print(rollout_id, flush=True)
    """
    in_flight = kills = 0
    while kills < 3 or (not in_flight and kills < 20):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if int(line) == 4:
                break
        time.sleep(0.013 * kills)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
        kills += 1
        in_flight += len(list(tmp_path.glob(".rollout_*.tmp")))
        files = sorted(tmp_path.glob("rollout_*"))
        assert files
        for path in files:
            table = read_bank(path)
            assert len(table) == rows and table["token_id"].notna().all() and len(table["student_top_ids"].iloc[-1]) == 4
        for path in (tmp_path / "summary.csv", tmp_path / "config.json"):
            assert path.read_bytes().endswith((b"\n", b"}"))
    TokenBankWriter(tmp_path, kind).close()
    assert not list(tmp_path.glob(".*"))
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert summary["rollout_id"].tolist() == [int(path.stem[-6:]) for path in sorted(tmp_path.glob("rollout_*"))]
    assert (summary["num_tokens"] == rows).all()
    assert in_flight, f"none of {kills} kills met a file half-written: the test did not test what it should"


def write_released_bank(directory: Path, rows: int = 4) -> None:
    """A csv and a jsonl file as the released writer leaves them: Python's csv and json, None, "" and NaN mixed."""
    directory.mkdir(parents=True, exist_ok=True)
    record = {name: 0.5 if str(kind) == "double" else 1 for name, kind in COLUMNS.items()}
    record |= {"pair_id": "p", "teacher_name": "t", "student_name": "7"}
    record |= {"quadrant": "Q3_lowH_highD", "budget_method": "tip", "Cmass_true": "", "seed": None, "target_student_rank": None}
    record |= {name: "" for name in RELEASED[-4:]} | {"sampled_reverse_kl": float("nan"), "token_id": 11, "budget_keep": 1}
    record |= {"loss_mask_original": 1}
    with open(directory / "rollout_000000.csv", "w", newline="") as file:
        table = csv.DictWriter(file, RELEASED)
        table.writeheader()
        for position in range(rows):
            table.writerow({k: "" if v is None else v for k, v in record.items()} | {"rollout_id": 0, "tok_pos": position})
    with open(directory / "rollout_000001.jsonl", "w") as file:
        for position in range(rows):
            file.write(
                json.dumps(record | {"rollout_id": 1, "tok_pos": position, "target_student_rank": position or None}) + "\n"
            )


def test_banks_of_the_released_code_are_read(tmp_path):
    write_released_bank(tmp_path)
    read = read_bank(tmp_path)
    assert len(read) == 8 and list(read) == RELEASED
    assert read["rollout_id"].tolist() == [0] * 4 + [1] * 4
    assert read["student_name"].tolist() == ["7"] * 8
    assert read["sampled_reverse_kl"].isna().all() and read["Cmass_true"].isna().all()
    assert read["target_student_rank"].tolist()[5:] == [1, 2, 3] and read["target_student_rank"].isna().sum() == 5
    assert read["H_norm"].eq(0.5).all() and read["token_id"].eq(11).all()


def test_read_bank_reads_only_what_is_asked(tmp_path):
    with TokenBankWriter(tmp_path, "csv") as bank:
        bank.write(0, bank_columns(5))
    read = read_bank(tmp_path, ["token_id", "H_norm", "student_top_ids"])
    assert list(read) == ["token_id", "H_norm", "student_top_ids"] and read["student_top_ids"].isna().all()
    with pytest.raises(DataError, match="no such file"):
        read_bank(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no rollout_"):
        read_bank(tmp_path / "empty")


def test_unreadable_files_are_named(tmp_path):
    for name, content in (("a.parquet", b"PAR1junk"), ("a.jsonl", b"{broken\n"), ("b.jsonl", b"[1]\n"), ("a.txt", b"x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read_bank(tmp_path / name)
    (tmp_path / "a.csv").write_bytes(b"token_id,H_norm\n1\n")
    with pytest.raises(DataError, match=r"a\.csv"):
        read_bank(tmp_path / "a.csv")


def test_an_empty_rollout_is_a_table_without_rows(tmp_path):
    for kind in FORMATS:
        with TokenBankWriter(tmp_path / kind, kind) as bank:
            bank.write(0, {"token_id": np.zeros(0, np.int32), "quadrant": np.zeros(0, np.int8)})
            bank.write(1, bank_columns(3))
        assert len(read_bank(tmp_path / kind)) == 3
        assert orjson.loads((tmp_path / kind / "config.json").read_bytes())["schema_version"] == 1
