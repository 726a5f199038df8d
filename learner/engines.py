"""What makes an update: forward, backward and DeepSpeed's ZeRO-3 step, with gathered or with whole weights.

`GatheredEngine` is DeepSpeed as it comes: its hooks gather each layer's weights for forward and backward, and reduce
each gradient. `WholeEngine` is for models of up to a billion parameters, whose weights every rank keeps whole:
forward and backward run without hooks, and on a GPU as CUDA graphs where layers are compiled. Both make the same
updates, up to rounding, and share DeepSpeed's optimizer and checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config.run import RunConfig
from common.lora import adapter_parameters
from common.student import attention_windows, lm_head_weight
from learner.batches import TrainingBatch
from learner.compiled_layers import compile_layers
from learner.graphed_layers import GraphedLayers
from learner.liger import use_liger_kernels
from learner.objective import LossSums
from learner.shards import discard_gradients, restore, shard
from learner.training_module import TrainingModule
from learner.whole_weights import WholeWeights, emptied


class Engine(ABC):
    """Forward, backward and step of one rank; all of them are collective, but for a WholeEngine's first two.

    Attributes:
        student: what is trained, published and saved.
        module: what computes the loss.
        run: how the module is called.
        graphs: micro-batches must come in the widths that are captured, and without masks.
        alone: forward and backward wait for no other rank, so that one may make them again.
    """

    student: PreTrainedModel
    module: TrainingModule
    run: Callable[[TrainingBatch, LossSums | None], Tensor]
    graphs: bool = False
    alone: bool = False

    def __init__(self, config: RunConfig, module: nn.Module, settings: dict[str, Any]) -> None:
        self.ranks = config.learner.ranks
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=module, model_parameters=trained, config=settings
        )

    @abstractmethod
    def forward(self, batch: TrainingBatch, sums: LossSums, *, last: bool) -> Tensor:
        """The loss of a micro-batch, a scalar; `last`: of this update."""

    @torch.no_grad()
    def label_logprobs(self, batch: TrainingBatch) -> Tensor:
        """log p of the tokens of x0 at the masked positions of a micro-batch, float [L]; without gradient."""
        return self.run(batch, None)

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add to the gradients, which are summed over micro-batches and ranks."""

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @abstractmethod
    def discard(self) -> None:
        """Forget the gradients: the update is not made."""

    def step(self) -> float:
        """Update the weights; returns the norm of the gradients before they were clipped. Where that is not finite, the
        same on every rank, no update is made."""
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm() or 0.0)

    def shard(self) -> dict[str, Tensor]:
        """This rank's shard of weights and optimizer (learner/shards.py), as it is."""
        return shard(self.deepspeed)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the shard that this rank, of as many, had.

        Raises:
            ValueError: it is another's; names the tensor.
        """
        restore(self.deepspeed, tensors)


class GatheredEngine(Engine):
    """Weights are gathered layer by layer, by DeepSpeed's hooks."""

    def __init__(self, config: RunConfig, student: PreTrainedModel, settings: dict[str, Any], on_gpu: bool) -> None:
        _prepare(student, config, on_gpu)
        self.student = student
        self.module = TrainingModule(student, config)
        deepspeed.zero.register_external_parameter(self.module, lm_head_weight(student))
        # one hook per layer instead of one per submodule: each layer is gathered as a whole
        deepspeed.utils.set_z3_leaf_modules(student, [type(student.model.layers[0])])
        super().__init__(config, self.module, settings)
        self.run = self.deepspeed

    def forward(self, batch: TrainingBatch, sums: LossSums, *, last: bool) -> Tensor:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        return self.run(batch, sums)

    def backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss * self.ranks)  # DeepSpeed averages over ranks, the coefficients already normalise

    def discard(self) -> None:
        discard_gradients(self.deepspeed)


class WholeEngine(Engine):
    """Weights are whole on every rank (learner/whole_weights.py); only gradients and steps are collective.

    Of a student with adapters DeepSpeed has A and B alone, and the base is loaded whole on every rank.
    """

    alone = True

    def __init__(self, config: RunConfig, student: PreTrainedModel, settings: dict[str, Any], on_gpu: bool) -> None:
        adapters = adapter_parameters(student)
        parts = nn.ParameterList(p.detach().clone() for p in adapters.values()) if adapters else None
        super().__init__(config, parts or TrainingModule(student, config), settings)
        if parts is None:
            names = {id(parameter): name for name, parameter in student.named_parameters()}
            self.weights = WholeWeights(emptied(student), names, self.optimizer)
        else:
            names = dict(zip(map(id, parts), adapters, strict=True))
            self.weights = WholeWeights(student.to(self.deepspeed.device), names, self.optimizer)
        self.student = self.weights.student
        _prepare(self.student, config, on_gpu)
        self.graphs = on_gpu and config.learner.compile and not config.learner.gradient_checkpointing
        read = None
        if self.graphs:
            read = GraphedLayers(self.student, attention_windows(student.config), "flex_attention")
        self.run = self.module = TrainingModule(self.student, config, read)

    def forward(self, batch: TrainingBatch, sums: LossSums, *, last: bool) -> Tensor:
        return self.run(batch, sums)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def discard(self) -> None:
        self.weights.clear_gradients()

    def step(self) -> float:
        self.weights.hand_over_gradients()
        norm = super().step()
        self.weights.gather()
        self.weights.clear_gradients()
        return norm

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        super().load(tensors)
        self.weights.gather()


def _prepare(student: PreTrainedModel, config: RunConfig, on_gpu: bool) -> None:
    """What runs in forward and backward: kernels, compilation, recomputation."""
    learner = config.learner
    if learner.liger_kernels:
        use_liger_kernels(student)
    if learner.compile and on_gpu:
        compile_layers(student)
    if learner.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
