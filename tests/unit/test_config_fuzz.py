"""Random changes to the presets end in ConfigError, or in a config whose plan and estimates can be made."""

import io
import os
import random
import time
from copy import deepcopy
from typing import Any

import yaml
from rich.console import Console

from common.config.errors import ConfigError
from common.config.fields import leaves
from common.config.file import PRESETS, load_config, preset_names
from common.config.section import plain_types
from deploy.commands.dry_run import show
from deploy.placement import plan

ROUNDS = int(os.environ.get("OPDLM_FUZZ_ROUNDS", "200"))
SECONDS = 10  # of any one config
KINDS = {path: plain_types(field.annotation) for path, _, field in leaves()}
FIELDS = list(KINDS)
NUMBERS = [
    0, 1, -1, 2, 3, 5, 7, 64, 100, 2**31, 2**53, 2**63, 10**30, 10**400, -(10**9), 0.0, -0.0, 0.5, 1.5, -0.5, 1e-300,
    1e-9, 1e9, 1e30, 1e300, float("inf"), float("-inf"), float("nan"), True, False, None,
]  # fmt: skip
WORDS = [
    "", " ", "null", "~", "true", "no", "1.10", "007", "5e12345", "1e-4", ".inf", ".nan", "-0", "0x10", "1_000", "1__0",
    "2020-01-01", "a #b", "x: y", "*", "&", "!", "!x", "@x", "%x", "`", "|", ">", "-", "- a", "?", ":", "{", "[", "]",
    "{{ x }}", "{a: 1}", "[1, 2]", "[.inf, 1]", "[]", "{}", "'", '"', "\\", "ü", "名", "\u2028", "a\nb", "a\tb", "\x00",
    "\ud800", "\U0001f600", ".", "..", "con", "x.", "/", "~/x", "~nobody/x", "$HOME/x", "$NO_SUCH", "${NO_SUCH}/x",
    "a/../b", "s3://bucket/x", "file:///x", "x" * 300, "x" * 5000, "/".join(["abc"] * 2000), "9" * 5000,
    "!!python/object/apply:os.system [ls]", "&a [*a]", "*a", "<<", "static", "random", "mixture", "opdlm", "sft",
    "topk", "hidden", "steps", "tiny", "deploy/models/tiny-arlm", "deploy/data/word_problems_train.jsonl", "/dev/null",
]  # fmt: skip
NAMES = ["", "kind", "rule", "x", "lr", "path", "deploy", "__class__", "model_config", "a.b", "0", "名", "n" * 500]


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if depth < 3 and kind < 0.12:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 3 and kind < 0.24:
        names = [*NAMES, *(path.rsplit(".", 1)[-1] for path in FIELDS)]
        return {rng.choice(names): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    if kind < 0.27:
        nested: Any = 1
        for _ in range(rng.choice([10, 60, 200])):
            nested = [nested] if rng.random() < 0.5 else {"a": nested}
        return nested
    return rng.choice(NUMBERS) if kind < 0.65 else rng.choice(WORDS)


def change(rng: random.Random, raw: dict[str, Any]) -> None:
    """Replace, add or remove one value somewhere."""
    path = rng.choice(FIELDS).split(".") if rng.random() < 0.8 else [rng.choice(NAMES)]
    path = path[: rng.randint(1, len(path))]
    if rng.random() < 0.1:
        path = [*path, rng.choice(NAMES)]
    node = raw
    for name in path[:-1]:
        if not isinstance(node.get(name), dict):
            node[name] = {}
        node = node[name]
    if rng.random() < 0.2:
        node.pop(path[-1], None)
    elif rng.random() < 0.5 and (kinds := KINDS.get(".".join(path), set())):
        # of the field's own kind, so that more of them are accepted and planned
        numbers = [n for n in NUMBERS if type(n) in kinds and (n is None or n >= 0)]
        node[path[-1]] = rng.choice(numbers or WORDS)
    else:
        node[path[-1]] = value(rng)


def written(rng: random.Random, raw: Any) -> str | bytes:
    """As YAML, in some of them with a raw word in the place of a value or with a damage."""
    text = yaml.dump(raw, Dumper=yaml.SafeDumper, allow_unicode=True, sort_keys=False)
    damage = rng.random()
    if damage < 0.15:
        lines = text.split("\n")
        i = rng.randrange(len(lines))
        lines[i] = lines[i].partition(":")[0] + ": " + rng.choice(WORDS)
        text = "\n".join(lines)
    elif damage < 0.2:
        i = rng.randrange(len(text) + 1)
        text = text[:i] + rng.choice(["\t", "\x00", "&", "*", "{", "[", "'", "\n", ": ", "%", "\ufeff"]) + text[i:]
    return text.encode("utf-8", "surrogatepass")


def override(rng: random.Random) -> list[str]:
    name = rng.choice(FIELDS) if rng.random() < 0.8 else rng.choice([*NAMES, *FIELDS]) + "." + rng.choice(NAMES)
    word = rng.choice(WORDS) if rng.random() < 0.5 else repr(rng.choice(NUMBERS[:10] + NUMBERS[12:]))
    return [f"--{name}={word}"] if rng.random() < 0.5 else [f"--{name}", word]


def test_random_configs_are_refused_in_words_or_can_be_planned(tmp_path):
    rng = random.Random(14)
    presets = {name: yaml.safe_load((PRESETS / f"{name}.yaml").read_text()) for name in preset_names()}
    file = tmp_path / "run.yaml"
    refused = accepted = 0
    for _ in range(ROUNDS):
        raw = deepcopy(presets[rng.choice(list(presets))])
        for _ in range(rng.randrange(3)):
            change(rng, raw)
        file.write_bytes(written(rng, raw))
        overrides = [part for _ in range(rng.randrange(3)) for part in override(rng)]
        begin = time.monotonic()
        try:
            config = load_config(str(file), overrides)
            plan(config)
            show(config, Console(file=io.StringIO(), width=120))
            accepted += 1
        except ConfigError as error:
            refused += 1
            for line in str(error).split("\n"):
                assert 10 < len(line) < 1500, (line, overrides)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{overrides}\n{file.read_bytes()!r}") from error
        assert time.monotonic() - begin < SECONDS, (overrides, file.read_bytes())
    assert min(refused, accepted) > ROUNDS / 10
