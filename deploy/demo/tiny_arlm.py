"""A tiny autoregressive language model, trained from scratch to solve word problems: the smallest real teacher.

`deploy/models/tiny-arlm` and `deploy/data/word_problems_*.jsonl` are shipped; both are made again, from the
repository's root, by ``python -m deploy.demo.tiny_arlm --out deploy/models/tiny-arlm --data deploy/data``.

The model is an ordinary `Qwen3ForCausalLM` with an ordinary fast tokenizer, so everything that loads a Qwen3
folder loads it: one token per byte, the role names and Qwen's chat markers as whole tokens, and a mask token.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from common.answers import is_correct
from deploy.demo.word_problems import (
    DIFFICULTIES,
    STANDARD,
    Difficulty,
    Split,
    WordProblem,
    generate,
    stream,
)

PAD, START, END, MASK = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_LENGTH = 512  # tokens, of prompt and response together
MAX_RESPONSE = 72  # tokens; the longest worked response has 59
IGNORED = -100  # the label that cross_entropy skips

PEAK_LR = 3e-3
WARMUP = 0.05  # of all steps
BUCKET_BATCHES = 16  # problems of so many batches are sorted by length together, which saves padding
DATA_SEED = 1  # of the shipped problems; the seeds of the training stream start further up
STREAM_SEED = 1000
TRAIN_PROBLEMS, HELDOUT_PROBLEMS = 4096, 200

Batch = tuple[torch.Tensor, torch.Tensor]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: 256 bytes, four special tokens and three role names; decodes to exactly what it encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (PAD, START, END, MASK)])
    # Role names are not special: they must survive decoding with skip_special_tokens.
    backend.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Saves the tokenizer's files into the folder `out`, which exists."""
    tokenizer.save_pretrained(out)
    # Transformers 5 writes its new class name; the old one is known to version 4, and so to more engines.
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A freshly initialised float32 model of 0.8M parameters; equal seeds give equal weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def prompt_text(question: str) -> str:
    """The chat prompt of one question; equals the tokenizer's chat template with a generation prompt."""
    return f"{START}user\n{question}{END}\n{START}assistant\n"


def collate(tokenizer: PreTrainedTokenizerFast, problems: list[WordProblem]) -> Batch:
    """Ids and labels, both int64 [problems, longest], padded on the right.

    Labels are the ids at response positions, the end token included, and `IGNORED` elsewhere.
    """
    prompts = tokenizer([prompt_text(p.question) for p in problems])["input_ids"]
    responses = tokenizer([p.response + END for p in problems])["input_ids"]
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(problems), width), tokenizer.pad_token_id)
    labels = torch.full((len(problems), width), IGNORED)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
    return ids, labels


def response_loss(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean next-token cross-entropy over the response tokens, in nats: a float32 scalar."""
    ids, labels = batch
    # Padding lies to the right of all that counts, so the causal mask alone is enough.
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    counted = labels[:, 1:] != IGNORED
    return cross_entropy(model.lm_head(hidden[counted]), labels[:, 1:][counted])


def exact_match(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[WordProblem]) -> float:
    """Share of the problems whose greedy response ends in the right answer, from 0 to 1."""
    inputs = tokenizer([prompt_text(p.question) for p in problems], return_tensors="pt", padding=True)
    model.eval()
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=MAX_RESPONSE,
        )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(is_correct(t, p.answer, "answer_line") for t, p in zip(texts, problems, strict=True)) / len(problems)


def make_tiny_arlm(
    out: Path,
    *,
    seed: int = 0,
    steps: int = 1600,
    batch_size: int = 32,
    threads: int = 1,
    difficulty: Difficulty = STANDARD,
    heldout: int = HELDOUT_PROBLEMS,
) -> dict[str, float]:
    """Trains the model from scratch, saves it as a Hugging Face folder in bfloat16 and returns metrics.

    Equal arguments give equal weights on one machine. `heldout` is the number of held-out problems that the
    saved model (read back as float32) answers greedily. Metrics: exact_match (0 to 1), first_loss and last_loss
    (nats per response token), steps, seconds (of training), parameters.
    """
    torch.set_num_threads(threads)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    started = time.perf_counter()
    losses = _train(model, tokenizer, _batches(seed, batch_size, difficulty), steps)
    seconds = time.perf_counter() - started

    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(out)
    save_tokenizer(tokenizer, out)
    saved = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32)
    problems = generate(DATA_SEED, heldout, "heldout", difficulty)
    return {
        "exact_match": exact_match(saved, tokenizer, problems),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "steps": steps,
        "seconds": round(seconds, 1),
        "parameters": saved.num_parameters(),
    }


def write_problems(folder: Path, difficulty: Difficulty = STANDARD) -> None:
    """Writes word_problems_train.jsonl (4096) and word_problems_heldout.jsonl (200): question, answer, domain."""
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[Split, int] = {"train": TRAIN_PROBLEMS, "heldout": HELDOUT_PROBLEMS}
    for split, count in counts.items():
        rows = [
            {"question": p.question, "answer": p.answer, "domain": "math"}
            for p in generate(DATA_SEED, count, split, difficulty)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"word_problems_{split}.jsonl").write_text(text, encoding="utf-8")


def _batches(seed: int, batch_size: int, difficulty: Difficulty) -> Iterator[list[WordProblem]]:
    problems = stream(STREAM_SEED + seed, "train", difficulty)
    order = random.Random(seed)
    while True:
        bucket = sorted(islice(problems, batch_size * BUCKET_BATCHES), key=lambda p: len(p.question) + len(p.response))
        batches = [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        order.shuffle(batches)
        yield from batches


def _train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batches: Iterator[list[WordProblem]],
    steps: int,
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup)),
        ],
        milestones=[warmup],
    )
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    losses = []
    model.train()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=steps, loss=float("nan"))
        for problems in islice(batches, steps):
            loss = response_loss(model, collate(tokenizer, problems))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            progress.update(task, advance=1, loss=losses[-1])
    return losses


def main() -> None:
    """Command line: trains the model into --out and, with --data, writes the problem files there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, help="folder of the model; without it nothing is trained")
    parser.add_argument("--data", type=Path, help="folder of the problem files; without it none are written")
    parser.add_argument("--difficulty", choices=sorted(DIFFICULTIES), default="standard")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    difficulty = DIFFICULTIES[args.difficulty]
    if args.data:
        write_problems(args.data, difficulty)
    if args.out:
        metrics = make_tiny_arlm(args.out, seed=args.seed, steps=args.steps, difficulty=difficulty)
        print(json.dumps(metrics))


if __name__ == "__main__":
    main()
