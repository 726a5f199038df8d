"""Run by tests on its own, where nothing of this project can be imported: what exported folders generate.

Reads [{"folder", "prompt", ...arguments of generate}, ...] from standard input, and writes the responses.
"""

import importlib.util
import json
import sys

sys.path.append(sys.argv[1])  # of the packages: python -I -S has none, and no editable install
assert not any(importlib.util.find_spec(name) for name in ("actors", "common", "deploy", "learner"))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

models, responses = {}, []
for asked in json.load(sys.stdin):
    folder, prompt = asked.pop("folder"), torch.tensor([asked.pop("prompt")])
    if folder not in models:
        models[folder] = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    made = models[folder].generate(prompt, **asked)
    assert made[:, : prompt.shape[1]].equal(prompt)
    responses.append(made[0, prompt.shape[1] :].tolist())
json.dump(responses, sys.stdout)
