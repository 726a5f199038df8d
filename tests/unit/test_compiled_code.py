"""Where compiled code is kept: in the folder of the config, else in the user's cache."""

from pathlib import Path

from common.compiled_code import compiled_code_environment
from common.config.file import load_config
from common.config.fingerprint import fingerprint


def test_all_that_is_compiled_goes_into_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_root")  # torch sets it when it looks for a cache
    assert compiled_code_environment(tmp_path) == {
        "TORCHINDUCTOR_CACHE_DIR": f"{tmp_path}/inductor",
        "TRITON_CACHE_DIR": f"{tmp_path}/triton",
        "TORCH_EXTENSIONS_DIR": f"{tmp_path}/extensions",
        "VLLM_CACHE_ROOT": f"{tmp_path}/vllm",
    }


def test_a_relative_folder_is_one_place_for_all_processes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert compiled_code_environment(Path("made"))["TRITON_CACHE_DIR"] == f"{tmp_path}/made/triton"


def test_the_default_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled_code_environment(None)["TRITON_CACHE_DIR"] == f"{tmp_path}/opdlm/compiled/triton"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiled_code_environment(None)["TRITON_CACHE_DIR"] == f"{tmp_path}/.cache/opdlm/compiled/triton"


def test_a_run_may_go_on_with_another_folder(tmp_path):
    config = load_config("tiny", ["--cache_dir", str(tmp_path)])
    assert config.cache_dir == tmp_path
    assert fingerprint(config) == fingerprint(load_config("tiny"))
