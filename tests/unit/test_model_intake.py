"""Models as people bring them: each is read rightly, or refused in one sentence by `train` and by `convert` alike."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from actors.evaluation.autoregressive import load_autoregressive
from common.config.errors import ConfigError
from common.config.file import load_config
from common.conversion import convert_folder, load_generation_config, mended, save_student
from common.model_files import ModelError
from common.prompts import prompt_ids
from common.student import head_of_folder, load_model, load_tokenizer
from deploy.commands.convert import convert_model as convert
from deploy.evaluation.asking import asked_like_training
from deploy.model_checks import check_model_folder, check_models
from tests.models import CHAT_TEMPLATE, tiny_qwen3, tiny_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(good, tmp_path):
    """A model folder of the test's own, to be changed."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def edit(file: Path, **changes) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def settings(path, *overrides: str):
    return load_config("tiny", ["--model.path", str(path), "--teacher.backend", "transformers", *overrides])


def check(path, *overrides: str):
    """What `train` checks of a model."""
    check_model_folder("model.path", str(path))
    return check_models(settings(path, *overrides))


def refused(path: Path, *overrides: str) -> str:
    """Why `train` refuses the model, which must be why `convert` does, and `convert` must leave nothing."""
    with pytest.raises(ConfigError) as by_train:
        check(path, *overrides)
    out = path.parent / "student"
    with pytest.raises(ConfigError) as by_convert:
        convert(str(path), out)
    assert [p for p in path.parent.iterdir() if "student" in p.name] == []
    said = str(by_train.value)
    assert said.startswith(f"model.path: {str(path)!r} ")
    assert "\n" not in said
    assert said.replace("model.path: ", "MODEL: ", 1) == str(by_convert.value)
    return said


def shard(model: Path, count: int = 2) -> dict[str, str]:
    """Split the weights into files with an index; returns its map."""
    weights = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    weight_map = {n: f"model-{1 + i % count:05}-of-{count:05}.safetensors" for i, n in enumerate(sorted(weights))}
    for file in set(weight_map.values()):
        save_file({n: w for n, w in weights.items() if weight_map[n] == file}, model / file, metadata={"format": "pt"})
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def rewrite(model: Path, change) -> None:
    weights = load_file(model / WEIGHTS)
    change(weights)
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})


def stale_shard(model):
    shutil.copy(model / WEIGHTS, model / "model-00001-of-00001.safetensors")


def stale_index(model):
    kept = (model / WEIGHTS).read_bytes()
    for file in set(shard(model).values()):
        (model / file).unlink()
    (model / WEIGHTS).write_bytes(kept)


def both_sets(model):
    kept = (model / WEIGHTS).read_bytes()
    shard(model)
    (model / WEIGHTS).write_bytes(kept)


def missing_shard(model):
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()


def no_index(model):
    shard(model)
    (model / INDEX).unlink()


def tensor_not_in_its_shard(model):
    edit(model / INDEX, weight_map=shard(model) | {"model.norm.weight": "model-00001-of-00002.safetensors"})


def cut_short(model):
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:20_000])


def cut_in_its_header(model):
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:100])


def empty_file(model):
    (model / WEIGHTS).write_bytes(b"")


def lfs_weights(model):
    (model / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def lfs_config(model):
    (model / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def lfs_tokenizer(model):
    (model / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def only_bin(model):
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()


def other_name(model):
    (model / WEIGHTS).rename(model / "weights.safetensors")


def adapter(model):
    (model / WEIGHTS).unlink()
    (model / "adapter_config.json").write_text("{}")


def fp8(model):
    edit(model / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})


def fp8_without_a_word(model):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(model, lambda weights: weights.update({name: weights[name].to(torch.float8_e4m3fn)}))


def packed(model):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(model, lambda weights: weights.update({f"{name}_packed": weights.pop(name).to(torch.int32)}))


def quantised_by(method):
    def change(model):
        edit(model / "config.json", quantization_config={"quant_method": method})

    return change


def tied_with_another_head(model):
    def change(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1

    rewrite(model, change)


def untied_without_head(model):
    edit(model / "config.json", tie_word_embeddings=False)


def a_layer_missing(model):
    edit(model / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)


def another_width(model):
    edit(model / "config.json", intermediate_size=96)


def padding_beyond_the_embedding(model):
    edit(model / "config.json", pad_token_id=288)


def newer_tokenizer(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["type"] = "BPEv9"
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def broken_generation_config(model):
    (model / "generation_config.json").write_text("{")


def impossible_generation_config(model):
    edit(model / "generation_config.json", max_new_tokens=-1)


def unsupported(model):
    edit(model / "config.json", model_type="phi3", architectures=["Phi3ForCausalLM"])


def unknown_model_type(model):
    edit(model / "config.json", model_type="shiny", architectures=["ShinyForCausalLM"])


def code_in_the_repository(model):
    auto_map = {"AutoConfig": "configuration_shiny.ShinyConfig", "AutoModelForCausalLM": "modeling_shiny.Shiny"}
    edit(model / "config.json", model_type="shiny", architectures=["ShinyForCausalLM"], auto_map=auto_map)
    (model / "configuration_shiny.py").write_text("raise SystemExit('code was run')")


def without_tokenizer_files(kind):
    """transformers builds an empty one of the class that tokenizer_config.json names."""

    def change(model):
        (model / "tokenizer.json").unlink()
        edit(model / "tokenizer_config.json", tokenizer_class=kind)

    return change


def tokenizer_of_a_larger_model(model):
    edit(model / "config.json", vocab_size=200)


def no_spare_row(model):
    edit(model / "tokenizer_config.json", mask_token=None)
    tokenizer = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(tokenizer.replace("<|mask|>", "<|used|>"))
    edit(model / "config.json", vocab_size=263)


def template(text):
    def change(model):
        (model / "chat_template.jinja").write_text(text)

    return change


def without_end_token(model):
    edit(model / "tokenizer_config.json", eos_token=None)
    (model / "chat_template.jinja").unlink()
    edit(model / "generation_config.json", eos_token_id=None)


def size(name, value):
    def change(model):
        edit(model / "config.json", **{name: value})

    return change


def two_rope_bases(model):
    edit(model / "config.json", rope_theta=5e5)


def broken_link(model):
    (model / WEIGHTS).rename(model.parent / "blob")
    (model / WEIGHTS).symlink_to(model.parent / "blob")
    (model.parent / "blob").unlink()


def weight_map_of_numbers(model):
    edit(model / INDEX, weight_map=dict.fromkeys(shard(model), 1))


def header_of_another_kind(model):
    header = json.dumps({"model.norm.weight": {"dtype": "F32"}}).encode()
    (model / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)


REFUSED = {
    stale_shard: f"has model.embed_tokens.weight in {WEIGHTS} and in model-00001-of-00001.safetensors",
    stale_index: f"has {WEIGHTS} beside {INDEX}, which names other files, and not every engine reads the same ones; "
    f"remove {INDEX}",
    both_sets: "remove what is out of date",
    missing_shard: f"lacks model-00002-of-00002.safetensors of the 2 files that {INDEX} names; download",
    no_index: f"has model-00001-of-00002.safetensors but no {INDEX}",
    tensor_not_in_its_shard: "has model.norm.weight in model-00001-of-00002.safetensors by",
    cut_short: f"has {WEIGHTS} with 20,000 bytes where its header says",
    cut_in_its_header: "cut short or damaged (100 bytes); download it again",
    empty_file: "cut short or damaged (0 bytes)",
    lfs_weights: f"has {WEIGHTS} as a Git LFS pointer; fetch the file itself with git lfs pull",
    lfs_config: "has config.json as a Git LFS pointer",
    lfs_tokenizer: "has tokenizer.json as a Git LFS pointer",
    only_bin: "holds no .safetensors file but pytorch_model.bin; load it with transformers and save",
    other_name: f"has weights.safetensors but no {WEIGHTS}; rename it",
    adapter: "is an adapter without its model; merge",
    fp8: "is quantised (fp8), and training needs plain weights; dequantise it with FineGrainedFP8Config",
    fp8_without_a_word: "is quantised (model.layers.0.mlp.up_proj.weight is F8_E4M3)",
    packed: "is quantised (model.layers.0.mlp.up_proj.weight_packed is I32)",
    quantised_by("gptq"): "is quantised (gptq), and training needs plain weights; give the model that it was",
    quantised_by("awq"): "is quantised (awq)",
    quantised_by("bitsandbytes"): "dequantise it with model.dequantize() and save_pretrained",
    tied_with_another_head: "ties the LM head to the embedding (tie_word_embeddings), but holds another lm_head.weight",
    untied_without_head: "lacks 1 of the 25 tensors that its config.json asks for, the first is lm_head.weight",
    a_layer_missing: "the first is model.layers.2.self_attn.q_proj.weight",
    another_width: "has model.layers.0.mlp.gate_proj.weight of shape [128, 64] where its config.json asks for [96, 64]",
    size("vocab_size", "288"): "has vocab_size '288' in config.json where a positive integer belongs; correct it",
    size("num_hidden_layers", 0): "has num_hidden_layers 0 in config.json",
    size("num_attention_heads", -2): "has num_attention_heads -2 in config.json",
    size("hidden_size", [64]): "has hidden_size [64] in config.json",
    size("num_attention_heads", 3): "has model.layers.0.self_attn.q_proj.weight of shape [64, 64] where",
    size("rms_norm_eps", "small"): "has a config.json that cannot be read (Validation error for field 'rms_norm_eps'",
    two_rope_bases: "has rope_theta 500000.0 and rope_parameters.rope_theta 1000000.0 in config.json, and not every",
    broken_link: f"has {WEIGHTS} as a link to a file that is not there; download the model again",
    weight_map_of_numbers: f"has no weight_map of names in {INDEX}",
    header_of_another_kind: f"has {WEIGHTS} damaged (its header cannot be read)",
    padding_beyond_the_embedding: "of which no model can be built (Padding_idx must be within num_embeddings)",
    newer_tokenizer: "has a tokenizer that cannot be read (data did not match any variant",
    broken_generation_config: "has a generation_config.json that cannot be read",
    impossible_generation_config: "has a generation_config.json that cannot be read",
    without_tokenizer_files(
        "Qwen2Tokenizer"
    ): "has an empty tokenizer (Qwen2Tokenizer with 0 tokens beside the special",
    without_tokenizer_files("LlamaTokenizer"): "has an empty tokenizer (LlamaTokenizer",
    without_tokenizer_files("GemmaTokenizer"): "has an empty tokenizer (GemmaTokenizer",
    tokenizer_of_a_larger_model: "has a tokenizer with ids up to 255 ('Ń') and an embedding of 200 rows",
    no_spare_row: "has no room for a mask token: all 263 rows of the embedding are used, and no token is reserved",
    template(
        "{{ raise_exception('A system message is required') }}"
    ): "has a chat template that raises TemplateError (A system message is required)",
    template("{% for m in messages %}{{ m.content }"): "has a chat template that raises TemplateSyntaxError",
    template("{{ messages[0]['parts'][0]['text'] }}"): "has a chat template that raises UndefinedError",
    template("You are helpful.<|im_end|>"): "has a chat template that leaves out what the user says",
    template("{% for m in messages %}{{ m.content }}\n{% endfor %}"): "writes no end token behind an answer (it writes "
    "'\\n'; end tokens are '<|im_end|>'), so responses would not end; correct the template, or name the tokens",
    template(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content }}{% endfor %}"
    ): "writes no end token",
    template(
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    ): "writes no end token",
    without_end_token: "has no end token in its tokenizer, generation config or chat template; name the tokens",
    unsupported: "has model_type 'phi3', which is not supported",
    unknown_model_type: "has a config.json that cannot be read (The checkpoint you are trying to load has model type",
    code_in_the_repository: "it needs code from the model's repository, which is never run here",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_a_model_that_is_refused(model, change):
    change(model)
    assert REFUSED[change] in refused(model)


def logits(path: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(path)(torch.arange(9)[None]).logits


def same_model(path: Path, reference: str) -> None:
    """`train` takes the model, `convert` writes its weights, and the head that the learner reads is its head."""
    check(path)
    out = path.parent / "student"
    convert(str(path), out, dtype="float32")
    assert torch.equal(logits(out), logits(Path(reference)))
    head = load_model(reference, torch.float32, "sdpa").get_output_embeddings().weight
    assert torch.equal(head_of_folder(str(path)), head)


def another_file(model):
    """With other tensors; transformers does not read it."""
    save_file({"opt.step": torch.zeros(1)}, model / "optimizer.safetensors")


def shards(model):
    shard(model, 3)


def shards_beside_stale_ones(model):
    """An index says which files count."""
    shard(model)
    save_file({"lm_head.weight": torch.zeros(288, 64)}, model / "model-00001-of-00003.safetensors")


def index_of_one_file(model):
    names = list(load_file(model / WEIGHTS))
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}))


def bin_beside(model):
    torch.save({}, model / "pytorch_model.bin")


def tied_with_the_same_head(model):
    rewrite(model, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))


def tied_under_the_name_of_the_head(model):
    rewrite(model, lambda weights: weights.update({"lm_head.weight": weights.pop("model.embed_tokens.weight")}))


def dtype_by_both_names(model):
    edit(model / "config.json", torch_dtype="float32", dtype="bfloat16")


def old_dtype_name(model):
    edit(model / "config.json", torch_dtype="bfloat16", dtype=None)


def old_rope(model):
    edit(model / "config.json", rope_theta=1e6, rope_parameters=None)


def code_beside_a_known_family(model):
    """Its model_type needs no code, so none is run."""
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_shiny.Shiny"})
    (model / "modeling_shiny.py").write_text("raise SystemExit('code was run')")


@pytest.mark.parametrize(
    "change",
    [shards, another_file, shards_beside_stale_ones, index_of_one_file, bin_beside, tied_with_the_same_head,
     tied_under_the_name_of_the_head, dtype_by_both_names, old_dtype_name, old_rope, code_beside_a_known_family],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_a_model_that_is_read(model, good, change):
    change(model)
    same_model(model, good)


def test_an_untied_head_is_read(tmp_path):
    path = tiny_qwen3(tmp_path / "model", tied=False)
    same_model(Path(path), path)
    assert not torch.equal(head_of_folder(path), load_file(Path(path) / WEIGHTS)["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {"do_sample": False, "temperature": 0.9, "top_p": 0.6},
        {"temperature": 0.9, "top_k": 20},
        {"num_beams": 1, "early_stopping": True},
    ],
)
def test_a_generation_config_that_transformers_would_not_save_is_mended(model, good, changes):
    edit(model / "generation_config.json", **changes)
    same_model(model, good)
    assert load_generation_config(str(model.parent / "student"), None).eos_token_id is not None
    kept, notes = mended(load_generation_config(str(model), None))
    assert len(notes) == 1
    assert all(f"{name} {value}" in notes[0] for name, value in changes.items() if name not in ("do_sample"))
    assert kept.eos_token_id == load_generation_config(good, None).eos_token_id


def test_settings_of_generation_in_the_config_are_mended(model, good):
    edit(model / "config.json", temperature=0.7, max_length=4096)
    same_model(model, good)
    assert "temperature" not in json.loads((model.parent / "student" / "config.json").read_text())


def test_a_failed_conversion_leaves_nothing(model, tmp_path, monkeypatch):
    def save(model, tokenizer, out, *_):
        out.mkdir()
        (out / WEIGHTS).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("common.conversion.save_student", save)
    with pytest.raises(OSError, match="No space left"):
        convert_folder(str(model), tmp_path / "student", 4, "<|mask|>", torch.float32)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


BOS_TEMPLATE = "{{ '<s>' }}" + CHAT_TEMPLATE
SYSTEM_REFUSED = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT_TEMPLATE
)
SYSTEM_BY_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHAT_TEMPLATE
)
IN_PARTS = CHAT_TEMPLATE.replace("message['content']", "message['content'][0]['text']")


def adds_bos(tokenizer):
    """As Llama 3's: it puts its begin-of-sequence token before every text."""
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    return tokenizer


@pytest.mark.parametrize(
    ("chat_template", "bos", "expected"),
    [
        (BOS_TEMPLATE, True, "<s><|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"),
        (CHAT_TEMPLATE, True, "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"),
        (SYSTEM_REFUSED, False, "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"),
        (SYSTEM_BY_DEFAULT, False, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
         "<|im_start|>assistant\n"),
        (IN_PARTS, False, "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"),
        (None, True, "<s>How many?"),
        (None, False, "How many?"),
    ],
)  # fmt: skip
def test_prompts_of_every_kind_of_chat_template(tmp_path, chat_template, bos, expected):
    tokenizer = tiny_tokenizer("<s>", chat_template=chat_template, bos_token="<s>")
    path = tiny_qwen3(tmp_path / "model", tokenizer=adds_bos(tokenizer) if bos else tokenizer)
    student = check(path).student
    assert student.tokenizer.decode(prompt_ids(student.tokenizer, "How many?")) == expected
    assert student.end_tokens[0] == student.tokenizer.eos_token_id


def test_a_model_whose_padding_is_its_end_token(tmp_path):
    """SmolLM2 and Llama pad with what ends a turn; that must not be taken for padding, or out of the loss."""
    tokenizer = tiny_tokenizer("<unused0>")
    tokenizer.pad_token = tokenizer.eos_token
    path = tiny_qwen3(tmp_path / "model", tokenizer=tokenizer, vocab=263)
    student = check(path).student
    assert (student.end_tokens, student.config.mask_token_id) == ((258,), 262)
    convert(path, tmp_path / "student", dtype="float32")
    assert torch.equal(logits(tmp_path / "student"), logits(Path(path)))


def test_a_token_beyond_the_embedding(tmp_path):
    """Gemma 3's tokenizers know an image token for which the text models have no row."""
    path = tiny_qwen3(tmp_path / "model", tokenizer=tiny_tokenizer("<unused0>", "<image>"), vocab=263)
    student = check(path).student
    assert (student.tokenizer.mask_token, student.config.vocab_size) == ("<unused0>", 263)


def test_a_checkpoint_records_how_it_is_asked(tmp_path, good):
    overrides = ["--data.enable_thinking", "true", "--data.system", "Be kind.", "--data.chat_template", BOS_TEMPLATE]
    student = check(good, *overrides).student
    save_student(load_model(good, torch.float32, "sdpa"), student, tmp_path / "student")
    assert asked_like_training(str(tmp_path / "student"), None)["enable_thinking"] is True
    assert asked_like_training(str(tmp_path / "student"), False)["system"] == "Be kind."
    assert load_tokenizer(str(tmp_path / "student")).chat_template == BOS_TEMPLATE


def test_another_weights_file_beside_is_refused_for_vllm(model):
    another_file(model)
    with pytest.raises(
        ConfigError, match=r"holds optimizer.safetensors beside its weights, and vLLM would read it too"
    ):
        check(model, "--teacher.backend", "vllm")
    shards(model)
    check(model, "--teacher.backend", "vllm")  # an index says which files count


@pytest.mark.parametrize(
    "load", [lambda path: load_model(path, torch.float32, "sdpa"), lambda path: load_autoregressive(path, "cpu")]
)
def test_pickled_weights_are_not_loaded(tmp_path, load):
    """Not even where no check of the folder has come before."""
    folder = Path(tiny_qwen3(tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights in safetensors \(.*save_pretrained"):
        load(str(folder))
