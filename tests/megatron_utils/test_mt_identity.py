"""What a resumed run is compared by: directories by content, servers by their addresses."""

from types import SimpleNamespace

import pytest

from slime.backends.megatron_utils.identity import check_identity, run_identity
from ta_opd.errors import ConfigError


def identity(**teachers):
    return run_identity(SimpleNamespace(hf_checkpoint=None, teachers=teachers))


def test_servers_are_known_by_their_addresses_in_any_order():
    one = identity(default=["http://a:1/generate", "http://b:2/generate/"])
    assert one == {"teacher:default": "at http://a:1/generate http://b:2/generate"}
    assert check_identity(one, identity(default=["http://b:2/generate", "http://a:1/generate"]), allow=False, where="here") == []


def test_another_address_is_another_teacher_unless_it_is_allowed():
    saved, current = identity(default=["http://a:1/generate"]), identity(default=["http://a:7/generate"])
    with pytest.raises(ConfigError, match=r"another teacher:default \(at http://a:1/generate -> at http://a:7/generate\).*--allow-teacher-change"):
        check_identity(saved, current, allow=False, where="here")
    assert check_identity(saved, current, allow=True, where="here") == ["teacher:default"]


def test_a_directory_in_the_place_of_a_server(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    saved, current = identity(default=["http://a:1/generate"]), identity(default=str(tmp_path))
    with pytest.raises(ConfigError, match=r"at http://a:1/generate -> a directory"):
        check_identity(saved, current, allow=False, where="here")
    assert check_identity(current, current, allow=False, where="here") == []


def test_a_checkpoint_that_recorded_no_teacher_goes_on():
    assert check_identity({"tokenizer": "x"}, identity(default=["http://a:1/generate"]), allow=False, where="here") == []
