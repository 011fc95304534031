import json
import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context.bank import (
    COLUMNS,
    build_bank,
    context_row,
    export_from_dumps,
    export_from_token_bank,
    fingerprint,
    load_contexts,
    write_bank,
)
from ta_opd.fixed_context.dumps import dump_files
from ta_opd.token_bank import TokenBankWriter


def sample(i, prompt=(5, 6, 7), length=4, **more):
    rng = np.random.default_rng(i)
    return {"tokens": [*prompt, *rng.integers(0, 50, length).tolist()], "response_length": length, "index": i, "group_index": i // 2,
            "status": "completed", "prompt": "p", "response": f"r{i}", "label": "3", "loss_mask": None, "rollout_log_probs": None, **more}  # fmt: skip


def torch_dump(path, samples, rollout_id=0):
    torch.save({"rollout_id": rollout_id, "samples": samples}, path)
    return path


def test_from_a_torch_dump(tmp_path):
    torch_dump(tmp_path / "rollout_0.pt", [sample(0), sample(1, loss_mask=[1, 0, 1, 1], rollout_log_probs=np.array([-1.0, -2.0, float("nan"), -3.0]))])
    bank = export_from_dumps([str(tmp_path)])
    assert tuple(bank.columns) == COLUMNS
    row = bank.iloc[1]
    assert (row["prompt_len"], row["resp_len"], row["total_len"], row["sample_index"], row["sample_ordinal"]) == (3, 4, 7, 1, 1)
    assert json.loads(row["tokens"])[:3] == [5, 6, 7] and json.loads(row["response_token_ids"]) == json.loads(row["tokens"])[3:]
    assert json.loads(row["loss_mask"]) == [1, 0, 1, 1] and json.loads(bank.iloc[0]["loss_mask"]) == [1, 1, 1, 1]
    assert json.loads(row["rollout_log_probs"]) == [-1.0, -2.0, None, -3.0] and row["teacher_log_probs"] == ""


def test_a_dump_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    with open(tmp_path / "x.pt", "wb") as handle:
        pickle.dump({"samples": [Evil()]}, handle)
    with pytest.raises(DataError, match="cannot be read safely"):
        export_from_dumps([str(tmp_path / "x.pt")])
    torch.save({"samples": [Evil()]}, tmp_path / "y.pt")
    with pytest.raises(DataError, match="cannot be read safely"):
        export_from_dumps([str(tmp_path / "y.pt")])
    assert not (tmp_path / "ran").exists()


def parquet_dump(path, samples, rollout_id=0):
    rows = [{**{k: v for k, v in s.items() if k != "index"}, "sample_index": s["index"], "rollout_id": rollout_id} for s in samples]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_from_parquet_dumps_in_the_order_of_rollouts(tmp_path):
    for r in (0, 2, 10):
        parquet_dump(tmp_path / f"rollout_{r}.parquet", [sample(10 * r), sample(10 * r + 1)], r)
    assert export_from_dumps([str(tmp_path)])["rollout_id"].tolist() == [0, 0, 2, 2, 10, 10]
    assert export_from_dumps([str(tmp_path)], released_order=True)["rollout_id"].tolist() == [0, 0, 10, 10, 2, 2]
    assert [p.name for p in dump_files([str(tmp_path / "rollout_*.parquet"), str(tmp_path)])] == [f"rollout_{r}.parquet" for r in (0, 2, 10)]


def test_first_n_and_seeded_random(tmp_path):
    parquet_dump(tmp_path / "a.parquet", [sample(i) for i in range(20)])
    first = export_from_dumps([str(tmp_path)], max_samples=5)
    assert first["sample_index"].tolist() == [0, 1, 2, 3, 4]
    drawn = [export_from_dumps([str(tmp_path)], max_samples=5, sample="random", seed=s)["sample_index"].tolist() for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] == sorted(drawn[0])


def test_responses_to_one_prompt_share_a_prompt_id(tmp_path):
    parquet_dump(tmp_path / "a.parquet", [sample(0), sample(1), sample(2, prompt=(5, 6))])
    ids = export_from_dumps([str(tmp_path)])["prompt_id"]
    assert ids[0] == ids[1] != ids[2]


def test_samples_without_response_are_skipped_and_none_at_all_is_an_error(tmp_path):
    parquet_dump(tmp_path / "a.parquet", [sample(0), sample(1, length=0)])
    assert len(export_from_dumps([str(tmp_path)])) == 1
    with pytest.raises(DataError, match="no response with tokens"):
        build_bank([None], max_samples=None)


@pytest.mark.parametrize(
    "change, message",
    [({"response_length": 9}, "exceeds the 7 tokens"), ({"loss_mask": [1, 1]}, "loss_mask has 2 values for a response of 4")],
)
def test_rows_that_do_not_add_up(change, message):
    with pytest.raises(DataError, match=message):
        context_row({**sample(0), **change}, source="x", ordinal=0)


def test_nothing_matches_and_unknown_sampling(tmp_path):
    with pytest.raises(DataError, match="nothing matches"):
        export_from_dumps([str(tmp_path / "*.pt")])
    with pytest.raises(ConfigError, match="first or random"):
        build_bank([], max_samples=1, sample="best")


def test_a_dump_cut_off(tmp_path):
    path = parquet_dump(tmp_path / "a.parquet", [sample(i) for i in range(50)])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cut off"):
        export_from_dumps([str(path)])


def token_bank(folder, samples):
    with_tokens = [s for s in samples]
    lengths = [s["response_length"] for s in with_tokens]
    writer = TokenBankWriter(folder, "parquet", {}, False)
    writer.write(
        0,
        {
            "rollout_id": 0, "sample_index": np.repeat([s["index"] for s in with_tokens], lengths), "group_index": 0,
            "tok_pos": np.concatenate([np.arange(n) for n in lengths]), "prompt_len": 3, "truncated": 0,
            "token_id": np.concatenate([s["tokens"][3:] for s in with_tokens]), "student_logp_sampled": -1.0, "teacher_logp_sampled": -2.0,
            "loss_mask_original": 1,
        },
    )  # fmt: skip
    writer.close()
    return folder


def test_from_a_token_bank_and_the_dump_of_its_run(tmp_path):
    samples = [sample(i) for i in range(3)]
    parquet_dump(tmp_path / "dump.parquet", samples)
    bank = export_from_token_bank(str(token_bank(tmp_path / "bank", samples)), [str(tmp_path / "dump.parquet")])
    assert [json.loads(t) for t in bank["tokens"]] == [s["tokens"] for s in samples]
    assert json.loads(bank["teacher_log_probs"][0]) == [-2.0] * 4


def test_a_token_bank_of_another_run(tmp_path):
    parquet_dump(tmp_path / "dump.parquet", [sample(i) for i in range(2)])
    other = token_bank(tmp_path / "bank", [{**sample(0), "tokens": [5, 6, 7, 1, 1, 1, 1]}])
    with pytest.raises(DataError, match="another response than the bank"):
        export_from_token_bank(str(other), [str(tmp_path / "dump.parquet")])
    missing = token_bank(tmp_path / "bank2", [sample(9)])
    with pytest.raises(DataError, match="no prompt for sample 9"):
        export_from_token_bank(str(missing), [str(tmp_path / "dump.parquet")])


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_bank_read_back_is_the_same(tmp_path, suffix):
    rows = [context_row(sample(i), source="x", ordinal=i) for i in range(3)]
    frame = build_bank(rows, max_samples=None)
    contexts = load_contexts(write_bank(tmp_path / f"b{suffix}", frame, {"seed": 1}), max_response_tokens=2)
    assert contexts.fingerprint == fingerprint(frame) and contexts.meta["seed"] == 1 and contexts.meta["contexts"] == 3
    assert [t.tolist() for t in contexts.tokens] == [sample(i)["tokens"][:5] for i in range(3)]
    assert contexts.scored_len.tolist() == [2, 2, 2] and contexts.resp_len.tolist() == [4, 4, 4]


def test_bad_banks(tmp_path):
    frame = build_bank([context_row(sample(0), source="x", ordinal=0)], max_samples=None)
    write_bank(tmp_path / "short.parquet", frame.assign(tokens="[1, 2]"), {})
    with pytest.raises(DataError, match=r"expected 3 \+ 4 tokens, got 2"):
        load_contexts(tmp_path / "short.parquet")
    write_bank(tmp_path / "text.parquet", frame.assign(tokens="[1, 2"), {})
    with pytest.raises(DataError, match="no JSON list"):
        load_contexts(tmp_path / "text.parquet")
    pd.DataFrame({"a": [1]}).to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(DataError, match="expected the columns tokens"):
        load_contexts(tmp_path / "other.csv")
