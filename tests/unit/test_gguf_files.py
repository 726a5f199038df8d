"""A GGUF file is a model path: unpacked once, with its tokenizer and chat template."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common import gguf_files
from common.config.errors import ConfigError
from common.config.file import load_config
from common.gguf_files import model_folder
from common.prompts import prompt_ids
from common.student import head_of_folder, load_model, load_tokenizer
from deploy.commands.convert import convert_model
from deploy.model_checks import check_model_folder, check_models
from deploy.placement import model_shape
from tests.models import tiny_gguf, tiny_qwen3


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("model"), seed=5)


@pytest.fixture(scope="module")
def file(folder, cache, tmp_path_factory):
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf", folder)


def settings(path):
    return load_config("tiny", ["--model.path", str(path), "--teacher.backend", "transformers"])


def test_its_weights_tokenizer_and_template(file, folder):
    model, expected = (load_model(str(path), torch.float32, "sdpa") for path in (file, folder))
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    assert model.config.dtype == torch.float32
    tokenizer, reference = (load_tokenizer(str(path)) for path in (file, folder))
    for text in ("Tom has 12 apples.", "naïve\n\n  日本語", "<|im_start|>user"):
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
    assert prompt_ids(tokenizer, "How many?").tolist() == prompt_ids(reference, "How many?").tolist()
    assert (tokenizer.eos_token, tokenizer.pad_token) == (reference.eos_token, reference.pad_token)
    torch.testing.assert_close(head_of_folder(str(file)), head_of_folder(folder))


def test_it_is_checked_planned_and_converted_like_any_model(file, folder, tmp_path):
    check_model_folder("model.path", str(file))
    student = check_models(settings(file)).student
    assert (student.tokenizer.mask_token, student.end_tokens) == ("<|mask|>", (258,))
    assert model_shape("model.path", str(file), None) == model_shape("model.path", folder, None)
    convert_model(str(file), tmp_path / "student", dtype="float32")
    ids = torch.arange(40)[None]
    student, expected = (load_model(str(path), torch.float32, "sdpa") for path in (tmp_path / "student", folder))
    torch.testing.assert_close(student(ids).logits, expected(ids).logits)


def test_a_folder_with_one_is_that_one(file):
    assert model_folder(str(file.parent)) == model_folder(str(file))


def test_it_is_unpacked_once_and_again_when_it_has_changed(file, tmp_path):
    copy = Path(shutil.copy(file, tmp_path / "copy.gguf"))
    first = Path(model_folder(str(copy)))
    (first / "mark").write_text("")
    assert Path(model_folder(str(copy))) == first and (first / "mark").exists()
    copy.write_bytes(file.read_bytes())
    os.utime(copy, (1, 1))
    assert Path(model_folder(str(copy))) != first
    assert [p.name for p in first.parent.iterdir() if p.name.endswith(".partial")] == []


def test_processes_that_start_together_unpack_it_once(file, tmp_path, monkeypatch):
    copy = Path(shutil.copy(file, tmp_path / "shared.gguf"))
    unpacked = []
    unpack = gguf_files._unpack
    monkeypatch.setattr(gguf_files, "_unpack", lambda *places: (unpacked.append(places), unpack(*places)))
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: model_folder(str(copy)), range(3)))
    assert len(folders) == len(unpacked) == 1


def test_quantised_weights_are_unpacked(folder, cache, tmp_path):
    file = tiny_gguf(tmp_path / "tiny.Q8_0.gguf", folder, quantised=True)
    model, exact = (load_model(str(path), torch.float32, "sdpa") for path in (file, folder))
    assert load_model(str(file), "auto", "sdpa").dtype == torch.bfloat16
    for (name, a), b in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0.01, rtol=0.02, msg=lambda m, n=name: f"{n}: {m}")


def damaged(file: Path, copy: Path, change) -> Path:
    copy.write_bytes(change(file.read_bytes()))
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-50_000], "cannot be unpacked by transformers"),
        (lambda data: data[:2000], "cannot be unpacked by transformers"),
        (lambda data: b"<html>" + data[:100], "is no GGUF file (damaged.gguf does not begin with GGUF)"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "has damaged.gguf as a Git LFS pointer"),
        (lambda data: b"", "is no GGUF file"),
        (lambda data: data.replace(b"qwen3", b"qwenX"), "cannot be unpacked by transformers"),
    ],
    ids=["cut", "cut-in-its-header", "a-page", "lfs", "empty", "unknown-architecture"],
)
def test_a_damaged_file_is_refused(file, tmp_path, change, message):
    path = damaged(file, tmp_path / "damaged.gguf", change)
    for field, refuse in (
        ("model.path", lambda: check_model_folder("model.path", str(path))),
        ("MODEL", lambda: convert_model(str(path), tmp_path / "student")),
    ):
        with pytest.raises(ConfigError) as error:
            refuse()
        assert str(error.value).startswith(f"{field}: {str(path)!r} {message}")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "student").exists()


def test_which_file_is_meant(file, tmp_path):
    shutil.copy(file, tmp_path / "a.Q4.gguf")
    shutil.copy(file, tmp_path / "a.Q8.gguf")
    with pytest.raises(ConfigError, match=r"holds 2 GGUF files \(a.Q4.gguf, a.Q8.gguf\); name one of them"):
        check_model_folder("model.path", str(tmp_path))
    part = shutil.copy(file, tmp_path / "b-00001-of-00002.gguf")
    with pytest.raises(ConfigError, match="is one part of a split GGUF model"):
        check_model_folder("model.path", str(part))
    with pytest.raises(ConfigError, match=r"folder '.*nope.gguf' does not exist"):
        check_model_folder("model.path", str(tmp_path / "nope.gguf"))
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ConfigError, match="is a file; give the folder of a Hugging Face"):
        check_model_folder("model.path", str(tmp_path / "model.bin"))
