"""Values without a meaning are refused by their field, before anything starts."""

import subprocess
import sys
from typing import Any

import pytest

from common.config.errors import ConfigError
from common.config.fields import leaves
from common.config.file import load_config, value_at
from common.config.section import plain_types


def fails(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config("tiny", list(overrides))
    return str(error.value)


def refused(field: str, value: str) -> str:
    said = fails(f"--{field}={value}")
    section = field.rpartition(".")[0]
    for line in said.split("\n"):
        assert line.startswith((field, f"{section}: ")), line
        assert len(line) < 300
    return said


def plain(kind: type) -> list[str]:
    """Fields of this type that a preset's choices have."""
    tiny = load_config("tiny")
    fields = []
    for path, _, field in leaves():
        node: Any = tiny
        for part in path.split("."):
            node = getattr(node, part, None)
        if node is not None and kind in plain_types(field.annotation):
            fields.append(path)
    return fields


@pytest.mark.parametrize("field", plain(float))
def test_every_float_is_finite_and_no_boolean(field):
    for value in (".inf", "-.inf", ".nan", "nan", "inf", "Infinity", "1e400", "9" * 400, "-1e400"):
        refused(field, value)
    for value in ("true", "false", "yes", "[1]", "{a: 1}", "fast", "1,5", "0x10"):
        refused(field, value)


@pytest.mark.parametrize("field", plain(int))
def test_every_integer_is_whole_has_an_end_and_is_no_boolean(field):
    for value in (
        "true",
        "false",
        "1.5",
        ".inf",
        ".nan",
        "1e30",
        "1" + 60 * "0",
        "9" * 5000,
        str(2**53 + 2),
        "-1",
        "[1]",
    ):
        refused(field, value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learner.betas", "[2, 3]"),
        ("learner.betas", "[0.9, 1]"),
        ("learner.betas", "[0.9, -0.1]"),
        ("learner.betas", "[0.9]"),
        ("learner.betas", "[0.9, 0.9, 0.9]"),
        ("learner.betas", "[0.9, .inf]"),
        ("learner.betas", "[0.9, true]"),
        ("learner.betas", "0.9"),
        ("learner.lr", "0"),
        ("learner.lr", "-0.0"),
        ("learner.lr", "2"),
        ("learner.eps", "1e300"),
        ("rollout.temperature", "1e-40"),
        ("rollout.temperature", "1e300"),
        ("objective.target.temperature", "1e-40"),
        ("objective.clip_nats", ".inf"),
        ("objective.clip_nats", "0"),
        ("data.domain_max_tokens", "{math: -5}"),
        ("data.domain_max_tokens", "{math: 0}"),
        ("data.domain_max_tokens", "{math: true}"),
        ("data.domain_max_tokens", "{math: 1.5}"),
        ("data.domain_max_tokens", "[5]"),
        ("rollout.resources.cpus", "1e-9"),
        ("rollout.resources.gpus", "1.5"),
        ("rollout.resources", "{cpus: 0}"),
        ("rollout.resources.labels", "{a: 'b c'}"),
        ("rollout.resources.labels", "{'a b': c}"),
        ("rollout.actors", "1000000000"),
        ("rollout.slots", "1000000000"),
        ("learner.ranks", "1000000000"),
        ("teacher.actors", "1000000000"),
        ("rollout.prompts_per_batch", "1000000000"),
        ("data.epochs", "1000000000"),
        ("curriculum.max_tokens", "1000000000"),
        ("pipeline.stage_timeout_s", "1e300"),
        ("pipeline.staleness", "true"),
        ("seed", str(2**32)),
        ("dashboard.port", "65536"),
        ("dashboard.host", ""),
        ("ray.address", "garbage"),
        ("ray.address", "a b:6379"),
        ("ray.address", "local"),
        ("ray.address", "host:0"),
        ("ray.address", "host:99999"),
        ("ray.address", "http://127.0.0.1:8265"),
        ("ray.address", "ray://host:10001"),
    ],
)
def test_a_number_that_means_nothing(field, value):
    refused(field, value)


def test_an_item_of_a_list_is_said_with_its_number():
    said = refused("learner.betas", "[2, 3]")
    assert "learner.betas.0: 2 is not accepted, it should be less than 1; change it in the config or with" in said
    assert said.count("with --learner.betas VALUE") == 2
    assert "learner.betas: [0.9] has too few values" in refused("learner.betas", "[0.9]")


@pytest.mark.parametrize(
    ("growth", "said"),
    [
        ("{kind: steps, sizes: [8], at_batches: [-5]}", "it should be greater than or equal to 1"),
        ("{kind: steps, sizes: [], at_batches: []}", "should have at least 1 item"),
        ("{kind: plateau, sizes: [8, 4000000]}", "4000000 tokens are more than the longest response"),
        ("{kind: plateau, sizes: [-8]}", "is no larger multiple"),
    ],
)
def test_blocks_that_cannot_be_are_refused(growth, said):
    assert said in fails("--block_growth", growth)


@pytest.mark.parametrize(
    ("text", "value"), [("1_000", 1000), ("+5", 5), ("5.0", 5), ("1e3", 1000), ("007", 7), (" 8 ", 8), ("-0", None)]
)
def test_spellings_of_an_integer(text, value):
    if value is None:
        refused("rollout.slots", text)
    else:
        assert load_config("tiny", ["--rollout.slots", text]).rollout.slots == value


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "head.cluster.local:6379", "[fe80::1]:6379", "h:1"])
def test_addresses_of_a_cluster(address):
    assert load_config("tiny", ["--ray.address", address]).ray.address == address


def test_zero_has_no_sign():
    assert str(load_config("tiny", ["--rollout.temperature=-0.0"]).rollout.temperature) == "0.0"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("{zero_optimization: {stage: 2}}", "zero_optimization.stage (2) can only be 3 here; leave it out"),
        ("{zero_optimization: {stage: true}}", "zero_optimization.stage (True) can only be 3 here"),
        ("{zero_optimization: 2}", "zero_optimization: expected DeepSpeed's keys below it, found 2"),
        ("{train_batch_size: 8}", "train_batch_size (8) is decided by learner.batch_rows; set that"),
        ("{train_micro_batch_size_per_gpu: 8}", "decided by learner.max_tokens_per_microbatch"),
        ("{gradient_accumulation_steps: 8}", "decided by learner.batch_rows"),
        ("{gradient_clipping: 0.5}", "decided by learner.grad_clip"),
        ("{fp16: {enabled: true}}", "fp16 ({'enabled': True}) is decided by learner.dtype"),
        ("{bf16: {enabled: true}}", "decided by learner.dtype"),
        ("{scheduler: {type: WarmupLR}}", "decided by learner.lr_schedule"),
        ("{optimizer: {type: Lion}}", "optimizer.type ('Lion') can only be 'AdamW' here"),
        ("{optimizer: {params: {lr: 1}}}", "optimizer.params.lr (1) is decided by learner.lr"),
        ("{optimizer: []}", "optimizer: expected DeepSpeed's keys below it, found []"),
        (
            "{zero_optimization: {offload_optimizer: {device: nvme}}}",
            "zero_optimization.offload_optimizer.device ('nvme') is not supported: checkpoints need the optimizer's",
        ),
        ("{aio: {block_size: .inf}}", "inf is no number to work with"),
        ("3", "learner.deepspeed: expected fields below it, found 3"),
    ],
)
def test_deepspeed_keys_that_contradict_the_learner(keys, said):
    assert said in fails("--learner.deepspeed", keys)


def test_deepspeed_keys_that_are_free():
    keys = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "optimizer": {"type": "AdamW"}}
    config = load_config(
        "tiny",
        ["--learner.deepspeed", "{zero_optimization: {stage: 3}, optimizer: {type: AdamW}}",
         "--learner.deepspeed.zero_optimization.offload_optimizer.device", "cpu"],
    )  # fmt: skip
    assert config.learner.deepspeed == keys
    assert config.learner.deepspeed["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--objective.method={}", "objective.method: '{}' is unknown; choose opdlm"),
        ("--objective={method: {a: 1}}", "objective.method: {'a': 1} is unknown; choose opdlm"),
        ("--objective={method: [sft]}", "objective.method: ['sft'] is unknown; choose opdlm"),
        ("--objective={method: 3}", "objective.method: '3' is unknown; choose opdlm"),
        ("--objective.source=[]", "objective.source: expected fields below it, found []"),
        ("--objective.source={kind: []}", "objective.source.kind: [] is unknown; choose student"),
        ("--objective.source={kind: null}", "objective.source.kind: null is unknown; choose student"),
        ("--rollout.unmasking=3", "rollout.unmasking: expected fields below it, found 3"),
        ("--rollout.unmasking=static", "rollout.unmasking: expected fields below it, found 'static'"),
        ("--rollout.unmasking=null", "rollout.unmasking: expected fields below it, found None"),
        ("--rollout={unmasking: {rule: {x: 1}}}", "rollout.unmasking.rule: {'x': 1} is unknown"),
        ("--model={path: [a]}", "model.path: ['a'] is not accepted, it should be a valid string"),
        ("--model={path: {a: b}}", "model.path: {'a': 'b'} is not accepted, it should be a valid string"),
        ("--name={{ x }}", "name: '{{ x }}' is no name of a run"),
        ("--model.path={{ MODEL }}", "model.path: '{{ MODEL }}' is a placeholder of a template"),
        ("--model.path=" + "x" * 5000, "' is too long for a path; use at most 255 bytes a name and 3800 in all"),
        ("--teacher.backend=" + "x" * 5000, "xxx' is unknown; choose vllm, transformers, self"),
        ("--" + "x" * 5000 + "=1", "xxx...: unknown field (value 1); the fields here are adapter"),
        ("--rollout.actors=" + "x" * 5000, "xxx' is not accepted"),
    ],
)
def test_a_value_of_another_kind_or_size_is_one_short_sentence(override, said):
    message = fails(override)
    assert said in message and len(message) < 500 and "\n" not in message


@pytest.mark.parametrize(
    "name", [".", "..", "con", "CON", "nul.txt", "com1", "x.", "x" * 129, "x" * 5000, "-x", "a/b", "ü"]
)
def test_a_name_that_is_no_folder_everywhere(name):
    assert f"name: '{name[:10]}" in fails(f"--name={name}")


@pytest.mark.parametrize("name", ["1.10", "console", "a.b.c", "x" * 128, "007", "com10"])
def test_names_that_are_fine(name):
    assert load_config("tiny", ["--name", name]).name == name


FILES = {
    "list": (b"- a\n", "expected sections such as `model:` and `data:`, found a list"),
    "text": (b"hello", "found 'hello'"),
    "number": (b"1.10", "found 1.10"),
    "empty": (b"", "found nothing"),
    "comment": (b"# only\n", "found nothing"),
    "binary": (bytes(range(256)), "not valid YAML: no text in UTF-8"),
    "latin1": ("name: Größe".encode("latin-1"), "not valid YAML: no text in UTF-8"),
    "tabs": (b"model:\n\tpath: x\n", "line 2: not valid YAML: found character '\\t' that cannot start any token; fix"),
    "twice": (b"name: a\nname: b\n", "line 2: not valid YAML: key 'name' stands twice; remove one"),
    "twice as text": (b"name: a\n'name': b\n", "line 2: not valid YAML: key 'name' stands twice"),
    "placeholder": (b"name: a\nmodel:\n  path: {{ MODEL }}\n", "line 3: not valid YAML: {{ ... }} is a placeholder of"),
    "list as name": (b"[a]: 1\n", "a list stands where the name of a field is due"),
    "bomb": (
        b"a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 10)) for c in range(98, 106)),
        "more than 20,000 values",
    ),
    "recursion": (b"a: &a [*a]\n", "an alias (*name) stands inside of what it names"),
    "deep": (b"a: " + b"[" * 10_000, "nested more than 40 levels deep"),
    "deep blocks": (b"".join(b" " * i + b"a:\n" for i in range(200)), "nested more than 40 levels deep"),
    "large": (b"#" * 2**21, "bytes, too many for a config"),
    "python": (b"name: !!python/object/apply:os.getcwd []\n", "has no meaning in a config"),
    "tag": (b"name: !x y\n", "the tag '!x' has no meaning in a config"),
    "alias": (
        b"name: *x\n",
        "line 1: not valid YAML: found undefined alias 'x'; fix the line, or put its text in quotes",
    ),
    "two": (b"name: a\n---\nname: b\n", "line 2: not valid YAML: but found another document"),
    "utf-16": ("\ufeffname: a\nmodell: {}\n".encode("utf-16-le"), "modell: unknown field"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_config(tmp_path, kind):
    content, said = FILES[kind]
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(str(file))
    assert said in str(error.value), str(error.value)
    assert kind == "utf-16" or "\n" not in str(error.value)


def test_a_config_that_is_no_file(tmp_path):
    for source, said in (
        (str(tmp_path), "is not a file; give a YAML file"),
        ("/dev/null", "CONFIG: '/dev/null' is not a file"),
        ("x" * 5000, "is too long for a path"),
        ("x" * 253, "no config"),
        ("", "CONFIG: '' is no path"),
        ("a\x00b", "holds a line break or another control character"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(source)


def test_a_file_that_may_not_be_read(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("name: a\n")
    file.chmod(0)
    # root may read everything: as another user, for whom the folders above must be open
    code = f"""
import os
from common.config.file import read_yaml
os.chdir({str(tmp_path)!r})
if os.geteuid() == 0:
    os.seteuid(65534)
read_yaml(__import__("pathlib").Path("run.yaml"))
"""
    tmp_path.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError: 'run.yaml' cannot be read (Permission denied); give a YAML file that can" in done.stderr


def test_values_are_set_by_their_path():
    assert value_at(load_config("tiny", ["--learner.lr", "1e-3"]), "learner.lr") == 1e-3
