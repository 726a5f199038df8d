"""The server that the options of `opdlm serve` ask for."""

from __future__ import annotations

from typing import Any

import torch

from actors.evaluation.autoregressive import load_autoregressive
from actors.evaluation.generation import load_student, load_verifier
from actors.sampler.sampling import Decoding
from common.config.errors import ConfigError
from common.grid import grid_floor
from common.student import attention_context, load_config, load_tokenizer
from deploy.evaluation.asking import asked_like_training, check_thinking
from deploy.evaluation.decoding_options import unmasking_of
from deploy.model_checks import model_errors
from deploy.serving.app import Server
from deploy.serving.asked import Verifier, prompter_of
from deploy.serving.engine import Engine
from deploy.serving.folder import StudentFolder
from deploy.serving.metrics import ServingMetrics
from deploy.serving.options import LONGEST, ServingOptions
from deploy.serving.original import Original

_SLOTS, _SLOTS_ON_GPU = 8, 64


def check_options(options: ServingOptions) -> None:
    """What can be wrong with a model and options that each are right, seen without loading weights.

    Raises:
        ConfigError: names the option, its value and what to do.
    """
    at = options.student
    with model_errors(at.field, at.folder):
        config, tokenizer = load_config(at.folder), load_tokenizer(at.folder)
    check_thinking("--thinking", options.thinking, tokenizer)
    asked_like_training(at.folder, options.thinking, options.system)
    longest_of(options, config)


def longest_of(options: ServingOptions, config: Any) -> int:
    """The longest sequence that is served, in tokens, whole blocks.

    Raises:
        ConfigError: --max-length is too long for the model, or holds no block.
    """
    wanted, positions = options.max_length, int(config.max_position_embeddings)
    block_size = options.block_size or int(config.block_size)
    if wanted is not None and wanted > positions:
        raise ConfigError(f"--max-length: {wanted} is more than the model's {positions} positions; use {positions}")
    longest = grid_floor(wanted or min(positions, LONGEST), block_size)
    if longest < 2:
        raise ConfigError(f"--max-length: {wanted} holds no block of {block_size} tokens; use {2 * block_size}")
    return longest


def slots_of(options: ServingOptions, on_gpu: bool) -> int:
    """Sequences that a server decodes at the same time."""
    return options.slots or (_SLOTS_ON_GPU if on_gpu else _SLOTS)


def load_server(options: ServingOptions) -> Server:
    """The models in this process, on its GPU where it has one.

    Raises:
        ConfigError: a model cannot be loaded, or an option does not fit it.
    """
    at = options.student
    with model_errors(at.field, at.folder):
        student, tokenizer = load_student(at.folder, options.dtype, base=at.base)
    folder = StudentFolder(at, options.dtype, student, tokenizer)
    longest = longest_of(options, student.config)
    block_size = student.config.block_size = options.block_size or int(student.config.block_size)
    verifier = None
    if options.verifier:
        with model_errors("--verify", options.verifier):
            verifier = load_verifier(options.verifier, options.dtype)
    verify: Verifier = "base" if verifier else "self" if attention_context(student.config) == "causal" else None
    rule, threshold, lower = options.decoding
    decoding = Decoding(unmasking_of(rule, threshold, lower, verify=verify or "self"), options.temperature)
    engine = Engine(
        student,
        tokenizer,
        slots=slots_of(options, torch.cuda.is_available()),
        longest=longest,
        queue_limit=options.queue,
        metrics=ServingMetrics(),
        prefix_tokens=options.prefix_cache,
        decoding=decoding,
        verifier=verifier,
    )
    prompter = prompter_of(
        tokenizer,
        asked_like_training(at.folder, options.thinking, options.system),
        block_size=block_size,
        longest=longest,
        most_tokens=options.max_tokens,
        decoding=decoding,
        verify=verify,
    )
    original = None
    if (path := options.compare) is not None:
        with model_errors("--compare", path):
            original = Original(path, *load_autoregressive(path, str(student.device), options.dtype))
    return Server(engine, prompter, options.name, options.host, options.api_key, original, folder, options.timeout)
