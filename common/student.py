"""Models as transformers loads them, read with block-causal masks; the student is the ARLM's own Hugging Face class.

What makes a student of an ARLM is in common/conversion.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common.adapter_files import ADAPTER_CONFIG, AdapterFolder, read_adapter
from common.config.model import AttentionContext
from common.gguf_files import model_folder
from common.lora import MergedWeights, adapter_tensors, add_adapters, gate_of, load_adapters
from common.model_files import ModelError, head_of, stored_tensors

# what a student's config holds beyond its ARLM's
RECORDED = ("mask_token_id", "block_size", "attention_context", "end_token_ids", "opdlm")
Gathered = Callable[[nn.Parameter], AbstractContextManager[Any]]  # makes a partitioned parameter whole

# families whose attention takes prebuilt masks, one for each kind of layer
SUPPORTED_FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "gemma3_text", "qwen3_moe")


def load_config(path: str) -> Any:
    """The transformers config of the model at `path`.

    Raises:
        ModelError: transformers cannot read it, or only by running code from the model's repository.
    """
    folder = model_folder(path)
    with third_party(
        "has a config.json that cannot be read", "correct it, or install a version of transformers that knows it"
    ):
        values, _ = PreTrainedConfig.get_config_dict(folder)
        family = values.get("base_model_type")
        if family not in SUPPORTED_FAMILIES:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # an exported folder (deploy/export): its own code is for who has not this program
        own = {name: value for name, value in values.items() if name not in ("model_type", "auto_map")}
        return CONFIG_MAPPING[family].from_dict(own)


def is_student(config: Any) -> bool:
    """Whether this is the config of a student, and not of an ARLM."""
    return getattr(config, "mask_token_id", None) is not None


def plain_architecture(config: Any) -> str:
    """The family's class for causal LMs, which reads a student's weights as it reads its ARLM's."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])


def student_architecture(config: Any) -> str:
    """What a checkpoint calls itself, such as Qwen3BlockDiffusionForCausalLM: engines that choose by this name refuse
    it, and do not decode it autoregressively. transformers chooses by `model_type`, which stays the family's."""
    return plain_architecture(config).replace("ForCausalLM", "BlockDiffusionForCausalLM")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path`.

    Raises:
        ModelError: transformers cannot read it, or only by running code from the model's repository.
    """
    with third_party(
        "has a tokenizer that cannot be read",
        "copy it from the model's repository, or install a version of transformers that knows it",
    ):
        return AutoTokenizer.from_pretrained(model_folder(path), trust_remote_code=False)


def load_model(path: str, dtype: torch.dtype, attention: str, base: str | None = None) -> PreTrainedModel:
    """The causal LM at `path` in evaluation mode, parameters in `dtype` [no gradient turned off]; an adapter there is
    of the model at `base`, or where that is None of the one that it names.

    Raises:
        ModelError: the family's attention cannot be made block-causal by a prebuilt mask.
    """
    config = load_config(path)
    check_family(config)
    adapter = read_adapter(path, base)
    if adapter is None:
        return pretrained(path, config=config, dtype=dtype, attn_implementation=attention).eval()
    return _adapted(adapter, config, dtype, attention)


def _adapted(adapter: AdapterFolder, config: Any, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The base model with its adapter: as gated layers, or merged where there is no gate.

    Raises:
        ModelError: the base model is not where the adapter says.
    """
    if Path(adapter.base).is_absolute() and not Path(adapter.base).exists():
        raise ModelError(
            f"is an adapter of {adapter.base!r}, which is not there; bring it back, or correct base_model_name_or_path "
            f"in {ADAPTER_CONFIG}"
        )
    model = load_model(adapter.base, dtype, attention)
    if config.vocab_size > model.config.vocab_size:
        add_rows(model, config.vocab_size)
    for name in RECORDED:
        if hasattr(config, name):
            setattr(model.config, name, getattr(config, name))
    model.generation_config = GenerationConfig.from_pretrained(adapter.folder)
    tensors = adapter_tensors(adapter.folder).items()
    if adapter.config.gated:
        add_adapters(model, adapter.config)
        load_adapters(model, tensors)
    else:
        MergedWeights(model, adapter.config).load(model, tensors)
    return model


def add_rows(model: PreTrainedModel, rows: int, gathered: Gathered = nullcontext) -> None:
    """Let embedding and LM head grow to `rows`; each new row is the mean of the old ones, on every rank the same.

    They are whole afterwards. (transformers' own resize draws random rows, and fills them on one rank only.)
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    for part in (embedding,) if tied else (embedding, head):
        with gathered(part.weight):
            old = part.weight.detach().clone()
        mean = old.float().mean(dim=0, keepdim=True).to(old.dtype)
        part.weight = nn.Parameter(torch.cat([old, mean.expand(rows - len(old), -1)]), part.weight.requires_grad)
    if tied:
        head.weight = embedding.weight
    embedding.num_embeddings = head.out_features = model.config.vocab_size = rows


def pretrained(path: str, **options: Any) -> PreTrainedModel:
    """The causal LM at `path`, from safetensors alone: the pickles of other formats run code when they are read.

    Raises:
        ModelError: it has no safetensors.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            model_folder(path), trust_remote_code=False, use_safetensors=True, **options
        )
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise ModelError(
            f"has no weights in safetensors ({path}), and others are not read; load it with transformers and save it "
            "with save_pretrained, on a machine where nothing can be harmed"
        ) from error


@contextmanager
def third_party(complaint: str, remedy: str) -> Iterator[None]:
    """What transformers and tokenizers raise about a model's files, of any class, as one sentence."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{complaint}: it needs code from the model's repository, which is never run here; give a model whose "
                "model_type transformers knows"
            ) from error
        raise ModelError(f"{complaint} ({' '.join(str(error).split())[:300]}); {remedy}") from error


def check_family(config: Any) -> None:
    """Refuse a model that block-causal masks alone do not make a student, with the reason."""
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, cap, None) is not None:
            raise ModelError(
                f"has model_type {config.model_type!r}, which soft-caps its logits ({cap} {getattr(config, cap)}); "
                "neither the attention nor the loss here do, so student and teacher would differ; choose another"
            )
    if config.model_type not in SUPPORTED_FAMILIES:
        raise ModelError(
            f"has model_type {config.model_type!r}, which is not supported: its attention must take prebuilt masks; "
            f"choose one of {', '.join(SUPPORTED_FAMILIES)}"
        )
    unknown = set(layer_kinds(config)) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(
            f"has attention layers {sorted(unknown)}; only full_attention and sliding_attention can be "
            "block-causal here: choose another model"
        )


def has_experts(config: Any) -> bool:
    """Whether a router deals the tokens out to experts (mixture of experts)."""
    return bool(getattr(config, "num_experts", None))


def stored_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors of a model's files, by name: experts, in memory one parameter of a layer, have one each there."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        layer, experts, kind = name.rpartition(".experts.")
        if not experts:
            shapes[name] = shape
            continue
        for expert in range(shape[0]):
            of_one = {"down_proj": shape[1:]}
            if kind == "gate_up_proj":
                of_one = dict.fromkeys(("gate_proj", "up_proj"), (shape[1] // 2, shape[2]))
            shapes |= {f"{layer}.experts.{expert}.{part}.weight": own for part, own in of_one.items()}
    return shapes


def parameter_count(config: Any) -> int:
    """Elements of all parameters of a model with this config, tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())


def attention_windows(config: Any) -> dict[str, int | None]:
    """The window of each kind of attention layer in the model, in positions; None: full attention.

    In a sliding-window layer a query of the student sees what block-causal attention allows and what lies fewer than
    `window` positions before it; its own block it sees to the end.
    """
    kinds = sorted(set(layer_kinds(config)))
    return {kind: config.sliding_window if kind == "sliding_attention" else None for kind in kinds}


def attention_context(config: Any) -> AttentionContext:
    """What clean tokens see in a student with this config (common/masks.py)."""
    context: AttentionContext = getattr(config, "attention_context", "block")
    return context


def layer_kinds(config: Any) -> list[str]:
    """The kind of attention of every layer."""
    if getattr(config, "layer_types", None):
        return list(config.layer_types)
    # Mistral has one kind: sliding where a window is set
    slides = config.model_type == "mistral" and config.sliding_window is not None
    return ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers


def default_attention() -> str:
    """SDPA with a dense mask on CPU, FlexAttention on CUDA."""
    return "flex_attention" if torch.cuda.is_available() else "sdpa"


def fitted_head(head: Tensor, tokens: int, rows: int) -> Tensor:
    """A teacher's LM head [V, d] with the `rows` of the student's: those behind its first `tokens` are zeros."""
    fitted = head.new_zeros(rows, head.shape[1])
    fitted[:tokens] = head[:tokens]
    return fitted


# FlexAttention's forward with heads of 64 under packed masks: 0.13 ms on an H100 in place of 0.47 ms
_NARROW_HEADS = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 128}


def hidden_states(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor,
    mask: Any,
    masked: Tensor | None = None,
    **attention: Any,
) -> Tensor:
    """Final hidden states [R, N, d] (after the last norm) under a prebuilt mask.

    Args:
        ids, positions: int64 [R, N].
        mask: bool [R, 1, N, keys] or a BlockMask for every layer, or one by kind of layer.
        masked: bool [R, N], where gated adapters act (`noised_masks`); None: nowhere.
        attention: what the model's attention implementation takes beyond the mask.
    """
    if ids.is_cuda and model.config._attn_implementation == "flex_attention" and head_width(model.config) <= 64:
        attention = {"kernel_options": _NARROW_HEADS} | attention
    gate = gate_of(model)
    if gate:
        gate.masked = None if masked is None else masked[..., None]
    output = model.model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        use_cache=False,
        **attention,
    )
    if gate and not torch.is_grad_enabled():  # else a recomputed forward reads it too
        gate.masked = None
    return output.last_hidden_state


def noised_masks(model: PreTrainedModel, ids: Tensor, copy: Tensor) -> Tensor | None:
    """bool [R, N]: the mask tokens of noised copies, where gated adapters act; None for a model without such. `copy` as
    in common/masks.py."""
    return (ids == model.config.mask_token_id) & (copy > 0) if gate_of(model) else None


def head_width(config: Any) -> int:
    """Elements of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def full_precision_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [..., d] times the LM head [V, d], in at least float32 [..., V].

    In bfloat16 a logit of 10 would be rounded by up to 0.03. No gradient flows from half precision.
    """
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.T
    if hidden.is_cuda:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return torch.mm(flat, weight.T, out_dtype=torch.float32).view(*hidden.shape[:-1], len(weight))
    return hidden.float() @ weight.T.float()


def lm_head_weight(model: PreTrainedModel) -> nn.Parameter:
    """[V, d]; the embedding itself where the two are tied."""
    return model.get_output_embeddings().weight


def head_of_folder(path: str) -> Tensor:
    """The LM head [V, d] of a model on disk, without loading the rest where the folder is local.

    Raises:
        ModelError: neither an LM head nor an embedding is in its files, or they are not whole.
    """
    folder = Path(model_folder(path))
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    tensors = stored_tensors(folder)
    name = head_of(tensors)
    with safe_open(tensors[name].file, framework="pt") as file:
        return file.get_tensor(name)
