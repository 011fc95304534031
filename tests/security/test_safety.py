"""What a run shows and opens, and what files of strangers can do: each promise is tried."""

import ast
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from slime.backends.sglang_utils.server import SGLangServer
from slime.backends.sglang_utils.server_flags import server_arguments
from slime.utils import config_file
from slime.utils.arguments import build_parser, parse_args
from slime.utils.misc import load_tokenizer
from ta_opd.errors import ConfigError, DataError
from ta_opd.token_bank import read_bank

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [p for top in ("ta_opd", "slime_ta_opd", "tools", "examples", "scripts") for p in (ROOT / top).rglob("*.py")]
KEY = "hush-hush-hush"


class Evil:
    """Pickled, it opens a file for writing when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_servers_bind_to_loopback_and_load_no_foreign_code_unless_asked():
    args = parse_args([])
    assert args.sglang_host == "127.0.0.1" and args.trust_remote_code is False and args.sglang_api_key is None
    args.device = "cpu"
    for role in ("student", "teacher"):
        server = SGLangServer.for_run(args, role, "model", port=1)
        assert server.command()[server.command().index("--host") + 1] == "127.0.0.1"
        assert "--trust-remote-code" not in server.command()
    assert "--trust-remote-code" in server_arguments(SimpleNamespace(trust_remote_code=True), "student", "model")


def test_servers_on_another_address_have_a_key_and_do_not_show_it():
    args = parse_args(["--sglang-host", "0.0.0.0", "--sglang-api-key", KEY])
    args.device = "cpu"
    server = SGLangServer.for_run(args, "student", "model", port=1)
    assert server.api_key == KEY and KEY not in " ".join(server.command()) and KEY not in repr(vars(server))
    assert SGLangServer("model", host="0.0.0.0", advertise="h").api_key  # made up


def test_no_key_in_the_saved_configuration_or_the_plan(tmp_path):
    args = parse_args(["--sglang-api-key", KEY])
    config_file.dump(args, tmp_path / "config.yaml")
    assert KEY not in (tmp_path / "config.yaml").read_text() and KEY not in json.dumps(config_file.resolved(args), default=str)
    flags = [a.dest for a in build_parser()._actions]
    assert not [f for f in flags if "wandb" in f and "key" in f], "wandb's key comes from its own environment variable"


def test_a_key_given_as_an_argument_leaves_the_process_list():
    script = "import sys; from slime.backends.sglang_utils.secret import hide; hide(sys.argv[2]); print('hidden', flush=True); sys.stdin.read()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "slime_ta_opd")))}
    words = [sys.executable, "-c", script, "--sglang-api-key", KEY]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout.readline() == "hidden\n"
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert KEY.encode() not in shown and b"--sglang-api-key" in shown
    finally:
        process.communicate("")


def test_a_model_directory_runs_no_code_of_its_own(tmp_path):
    mark = tmp_path / "ran"
    model = tmp_path / "model"
    model.mkdir()
    (model / "own.py").write_text(f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n")
    (model / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}}))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}))
    with pytest.raises(Exception, match="trust_remote_code|[Uu]nrecognized|does not recognize|tokenizer"):
        load_tokenizer(str(model), False)
    assert not mark.exists()


def test_a_configuration_file_cannot_make_objects(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "c.yaml").write_text(f"lr: !!python/object/apply:builtins.open [{str(mark)!r}, 'w']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_args(["--config", str(tmp_path / "c.yaml")])
    assert not mark.exists()


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_a_bank_is_read_as_data(tmp_path, suffix):
    mark = tmp_path / "ran"
    folder = tmp_path / "bank"
    folder.mkdir()
    (folder / f"rollout_000000.{suffix}").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(Exception):  # noqa: B017 - which error depends on the format
        list(read_bank(folder))
    assert not mark.exists()


def evil_checkpoint(folder: Path, where: str, mark: Path) -> Path:
    """A torch_dist directory whose `where` would open a file when it is unpickled."""
    from torch.distributed.checkpoint.metadata import Metadata

    iteration = folder / "iter_0000000"
    iteration.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("0")
    (iteration / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}')
    torch.save(Evil(mark) if where == "common.pt" else {"ta_opd": {}}, iteration / "common.pt")
    metadata = Metadata(state_dict_metadata={}, storage_data=Evil(mark) if where == ".metadata" else {})
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))
    return iteration


@pytest.mark.parametrize("where", [".metadata", "common.pt"])
def test_a_checkpoint_runs_no_code(tmp_path, where):
    from slime.backends.megatron_utils import checkpoint
    from slime.backends.megatron_utils.torch_dist_files import TorchDistReader

    mark = tmp_path / "ran"
    iteration = evil_checkpoint(tmp_path / "c", where, mark)
    with pytest.raises(DataError, match="refused"):
        checkpoint.read_common(checkpoint.find(tmp_path / "c"))
    if where == ".metadata":
        with pytest.raises(DataError, match="refused"):
            TorchDistReader(iteration)
    assert not mark.exists()
    if where == ".metadata":  # the same file does run code where it is read as torch reads it
        pickle.loads((iteration / where).read_bytes())
        assert mark.exists()


def test_weights_of_a_legacy_format_run_no_code_in_a_server(tmp_path):
    """SGLang reads a `.bin` that is torch's oldest format, a tar, with weights_only=False. Not in our servers; elsewhere it would."""
    mark, weights = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    with tarfile.open(weights, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Evil(mark))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    script = (
        "import contextlib, os\n"
        "from sglang.srt.model_loader.weight_utils import pt_weights_iterator\n"
        "for _ in range(2):\n"
        f"    with contextlib.suppress(Exception): list(pt_weights_iterator([{str(weights)!r}]))\n"
        f"    print(os.path.exists({str(mark)!r}))\n"
        "    os.environ.pop('TORCH_FORCE_WEIGHTS_ONLY_LOAD')\n"
    )
    environment = SGLangServer("model", device="cpu")._environment(str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.split()[-2:] == ["False", "True"] and done.stderr.count("pytorch_model.bin with weights_only=False") == 2, done.stderr


def test_objects_beside_tensors_are_read_as_weights_only(tmp_path):
    from slime.backends.megatron_utils.untrusted import only_weights

    mark = tmp_path / "ran"
    torch.save(Evil(mark), tmp_path / "x.pt")
    with only_weights(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt", weights_only=False)  # what torch's load planner says
    assert not mark.exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_no_source_file_reads_data_in_a_way_that_could_run_code():
    """torch.load only with weights_only, YAML by a safe loader, no reading of pickles outside untrusted.py, no np allow_pickle.

    Nor a foreign model's code by a constant, and no such function under another name.
    """
    found = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module in ("pickle", "dill", "joblib", "torch", "yaml")):
            found += [f"{path}:{node.lineno}: from {node.module} import {n.name}" for n in node.names if "load" in n.name and n.name != "safe_load"]
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)):
            owner = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
            name, words = f"{owner}.{call.func.attr}", {k.arg: ast.unparse(k.value) for k in call.keywords}
            bad = words.get("trust_remote_code") == "True" or (
                (name == "torch.load" and words.get("weights_only") != "True")
                or name in ("pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "pd.read_pickle", "dill.load")
                or (name == "yaml.load" and "SafeLoader" not in path.read_text())
                or words.get("allow_pickle") == "True"
            )
            if bad:
                found.append(f"{path.relative_to(ROOT)}:{call.lineno}: {name}")
    assert found == []
