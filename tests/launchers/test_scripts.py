"""Every script: shellcheck, --help from its declarations, and no path of a machine in it."""

import re
import subprocess

import pytest

from tests.launchers.conftest import ROOT, libraries, scripts


def shellcheck(*words) -> None:
    done = subprocess.run([ROOT / ".venv/bin/shellcheck", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def checked() -> list[str]:
    """Every launcher, and what is for the user of the tree: setup, test, quick start, the job of a cluster."""
    return [*scripts(), *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("scripts/*.sh")), "scripts/cluster/slurm.sbatch"]


def longest_with_each_library() -> list[str]:
    """The longest launcher for every set of libraries that launchers read."""
    found = {}
    for name in sorted(checked(), key=lambda name: (ROOT / name).stat().st_size):
        read = frozenset(re.findall(r"^\s*# shellcheck source=(\S+)", (ROOT / name).read_text(), re.M))
        if read:
            found[read] = name
    return sorted(found.values())


@pytest.mark.parametrize("name", libraries())
def test_shellcheck_libraries(name):
    shellcheck("-x", "-e", "SC1091,SC2154", name)


def test_shellcheck_launchers():
    """Each by itself: following what they read, the same libraries would be checked once for every launcher, a minute in all."""
    shellcheck("--norc", "-e", "SC1091,SC2154,SC2034", *checked())


@pytest.mark.parametrize("name", longest_with_each_library())
def test_shellcheck_launchers_with_what_they_read(name):
    shellcheck("-e", "SC1091,SC2154,SC2034", name)


def test_scripts_are_found_and_run():
    assert len(scripts()) > 50
    for name in scripts():
        assert (ROOT / name).stat().st_mode & 0o111, f"{name} cannot be executed"
        assert (ROOT / name).read_text().startswith("#!/usr/bin/env bash\n"), name


@pytest.mark.parametrize("name", scripts())
def test_help_lists_every_variable_with_default_and_meaning(name, launch):
    shown = launch(name, "--help", check=True)
    listed = launch(name, "--variables", check=True).out.splitlines()
    assert listed[0].startswith("about\t") and len(listed[0]) > 20
    assert len(listed) > 4
    for line in listed[1:]:
        group, variable, kind, default, meaning, _flag, _empty = line.split("\t")
        assert group and kind and len(meaning) >= 5, line
        assert re.search(rf"^  {variable}={re.escape(default)}\s.*{re.escape(meaning)} \[{re.escape(kind)}\]$", shown.out, re.M), line


def test_no_path_of_a_machine():
    for name in [*scripts(), *libraries()]:
        found = re.findall(r"/(?:home|root|work|mnt|path/to)/\S*", (ROOT / name).read_text())
        assert not found, (name, found)


def test_nothing_of_others_is_ever_stopped():
    for name in [*scripts(), *libraries()]:
        assert not re.search(r"\b(pkill|killall|ray stop)\b", (ROOT / name).read_text()), name


@pytest.mark.parametrize(("version", "code"), [("3 2", 2), ("4 2", 2), ("4 3", 2), ("4 4", 0), ("5 0", 0), ("10 0", 0)])
def test_a_bash_that_is_too_old_is_said(version, code, tmp_path):
    """macOS comes with 3.2, where the first associative array would be the error."""
    library = tmp_path / "scripts/lib"
    library.mkdir(parents=True)
    (library / "run.sh").write_text((ROOT / "scripts/lib/run.sh").read_text().replace("BASH_VERSINFO", "VERSION"))
    for name in ("vars.sh", "train_vars.sh"):
        (library / name).write_text("")
    done = subprocess.run(["bash", "-c", f"VERSION=({version}); source {library}/run.sh"], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("expected bash 4.4 or newer" in done.stderr) == bool(code)
