"""The profile of a server: kernels by kind, time without one, and a whole run with a tiny model."""

import json
import os

import pytest

from benchmarks.gpu import server_trace


def event(name, ts, dur, cat="kernel"):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def test_kernels_are_summed_by_kind_and_gaps_are_seen():
    found = server_trace.account([
        event("nvjet_sm90_tst_320x128", 0, 1000), event("_fwd_kernel", 1500, 500), event("void at::native::mbtopk::gatherTopK<float>", 1900, 200),
        event("void flashinfer::norm::FusedAddRMSNormKernel", 3000, 100), event("Memcpy DtoH", 3050, 20, "gpu_memcpy"), event("aten::mm", 0, 9999, "cpu_op"),
    ])  # fmt: skip
    assert found["ms"] == {"matrix products": 1.0, "attention": 0.5, "top-K": 0.2, "norms": 0.1, "copies": 0.02}
    assert found["span_ms"] == 3.1 and found["busy_ms"] == pytest.approx(1.0 + 0.6 + 0.1) and found["launches"]["norms"] == 1
    assert server_trace.account([event("aten::mm", 0, 1, "cpu_op")]) is None


@pytest.mark.parametrize(("name", "kind"), [("_largest_kernel", "rows read once"), ("per_token_quant_fp8_kernel", "quantization"),
                                            ("cutlass_3x_gemm_sm90_fp8", "matrix products"),
                                            ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<", "attention"), ("something_new", "other")])  # fmt: skip
def test_kinds_of_kernels(name, kind):
    assert server_trace.kind_of(name) == kind


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TA_OPD_SLOW") != "1", reason="a profiled server takes over a minute on a CPU; TA_OPD_SLOW=1 runs it")
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_whole_run_with_a_tiny_model(role, tmp_path, capsys):
    out = tmp_path / "deep" / "trace.json"
    assert server_trace.main(["--tiny", "--device", "cpu", "--role", role, "--samples", "2", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert len(result["seconds"]) == 2 and result["tokens_per_second"] > 0 and result["gpu"] is None
    assert "no GPU events" in capsys.readouterr().out
