"""What every process of a server does before SGLang is imported."""

import ast
import os
import subprocess
import sys

CODE = """
import gc, runpy, sys
runpy.run_module("slime.backends.sglang_utils.launch", run_name="__mp_main__")
print(gc.get_threshold(), "sglang" in sys.modules)
"""


def test_a_spawned_process_collects_old_objects_rarely():
    env = {**os.environ, "SLIME_SERVER_PARENT": str(os.getpid()), "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=60)
    young, middle, old = ast.literal_eval(out.stdout.split(" False")[0])
    assert young * middle * old > 100_000_000 > young * middle, out.stderr
