"""An error inside an actor, of a kind that nobody foresaw: the run ends, with everything that it started and nothing else. By hand."""

import os

import pytest

from tests.e2e.live import LiveRun

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.skipif(not os.environ.get("TA_OPD_SLOW"), reason="set TA_OPD_SLOW=1: minutes")]
FILTER = """
def keep(args, samples):
    if samples[0].group_index >= 20:  # in the third rollout
        raise ZeroDivisionError("a user's mistake")
    return True
"""


@pytest.mark.parametrize("script", ["train.py", "train_async.py"])
def test_an_error_in_the_rollout_manager(task, servers, tmp_path, script):
    (tmp_path / "own.py").write_text(FILTER)
    flags = ["--rm-url", f"{servers.teacher}/generate", "--dynamic-sampling-filter-path", f"{tmp_path / 'own.py'}:keep", "--num-rollout", "1000"]
    run = LiveRun(task, tmp_path / "run", *flags, "--max-restarts", "2", "--save-interval", "1", script=script)
    try:
        run.wait(lambda: run.named("sglang::scheduler"), "its own engine")
        output = run.ends(1)
    finally:
        run.stop()
    assert "a user's mistake" in output and "keep" in output and "own.py" in output  # where to look
    assert "starting over" not in output  # the same would come again
    from slime.backends.sglang_utils.client import SGLangClient

    client = SGLangClient([servers.student, servers.teacher], name="others")
    assert len(client.run(client.model_info())) == 2  # servers of somebody else still answer
    client.close()
    assert len(run.rows()) >= 1 and (run.checkpoints / "latest_checkpointed_iteration.txt").exists()
