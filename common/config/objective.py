"""The objective's five choices as configuration: trajectory source, state selection, weight, target, divergence.

    L = E_{tau ~ source, t ~ state} sum_b sum_{i in M(x_t^b)} w(t) D(phi^i(.|x0) || p_theta^i(.|x0^{<b}, x_t^b))

(OPDLM, arXiv 2606.06712, section 2 of the method's specification.) Each is combined freely with the others; what makes
no sense is refused with the reason.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.config.section import Section

MOST_EXTRA = 4  # losses beside the main one, each of which has metrics


def _window() -> Any:
    return Field(
        0,
        ge=0,
        description="train what was revealed in so many rounds of the block, from the state's own on; what came "
        "later is masked and not trained (TABOM); 0: train all that is masked",
    )


class PerBlockState(Section):
    """For each block, one of its realised rounds, drawn uniformly."""

    kind: Literal["per_block"] = "per_block"
    window: int = _window()


class GlobalState(Section):
    """One round index for the whole trajectory (Algorithm 1): blocks with fewer rounds contribute nothing."""

    kind: Literal["global"] = "global"
    window: int = _window()


class AllRoundsState(Section):
    """Every realised round of every block: one copy of the trajectory per round index."""

    kind: Literal["all_rounds"] = "all_rounds"
    window: int = _window()


class RandomState(Section):
    """Masks drawn at a ratio t ~ U(min_ratio, max_ratio), per block or per sequence (MDLM, BD3LM)."""

    kind: Literal["random"] = "random"
    scope: Literal["block", "sequence"] = Field("block", description="one ratio per block or per sequence")
    min_ratio: float = Field(0.0, ge=0, le=1, description="least mask ratio")
    max_ratio: float = Field(1.0, ge=0, le=1, description="greatest mask ratio")
    at_least_one: bool = Field(True, description="mask one position in a block whose draw masked none")
    position_bias: float = Field(
        0.0,
        ge=0,
        le=50,
        description="later positions of a block are masked more often: of its i-th, in proportion to "
        "exp(position_bias (1 - t) i / B); 0: all alike (Efficient-DLM, whose best is 2.3)",
    )
    uniform_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability that a masked position shows a uniformly drawn token and not the mask token (BARD)",
    )
    all_positions: bool = Field(
        False, description="also train the positions that are not masked, of blocks that have a masked one (BARD)"
    )

    @property
    def mixes(self) -> bool:
        """Whether states show other tokens than masks where they are trained."""
        return self.uniform_share > 0 or self.all_positions

    @model_validator(mode="after")
    def _ordered(self) -> RandomState:
        if self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio ({self.min_ratio}) is above max_ratio ({self.max_ratio}); lower min_ratio")
        return self


class ComplementaryState(Section):
    """A random mask and its complement as two copies: every position is trained exactly once (LLaDA2.0)."""

    kind: Literal["complementary"] = "complementary"
    masks: RandomState = Field(RandomState(), description="how the first mask is drawn")


class LiftState(Section):
    """Easy tokens while much is masked, hard ones while little is (LIFT).

    The states are masked at t + rho, one forward without gradient reads the student's probability of each masked token,
    and t / (t + rho) of them stay masked.
    """

    kind: Literal["lift"] = "lift"
    masks: RandomState = Field(RandomState(scope="sequence"), description="how t is drawn, and what it masks")
    rho: float = Field(0.1, gt=0, le=1, description="share of the tokens masked at first beyond t")
    keep: Literal["by_ratio", "easiest", "hardest", "random"] = Field(
        "by_ratio",
        description="which masked tokens stay masked: the most probable, the least probable, or any; by_ratio: the "
        "first where t is above 2/3, the second where it is below 1/3, else any",
    )

    @model_validator(mode="after")
    def _only_masks(self) -> LiftState:
        if self.masks.mixes:
            raise ValueError(
                "masks.uniform_share and masks.all_positions do not go with kind 'lift', which chooses among masked "
                "tokens; turn them off"
            )
        return self


class SuffixState(Section):
    """Each block masked from one of its positions on, drawn uniformly, or whole: what verified decoding drafts from."""

    kind: Literal["suffix"] = "suffix"
    whole_share: float = Field(
        0.5, ge=0, le=1, description="probability that a block is masked whole, as drafts of the next block find it"
    )


class MixtureState(Section):
    """Each trajectory draws one of three ways, in proportion to their shares."""

    kind: Literal["mixture"] = "mixture"
    trajectory_share: float = Field(1.0, ge=0, description="weight of states that were visited (`visited`)")
    random_share: float = Field(0.0, ge=0, description="weight of random masks")
    complementary_share: float = Field(0.0, ge=0, description="weight of a random mask and its complement")
    visited: Literal["per_block", "global", "all_rounds"] = Field("per_block", description="which visited states")
    masks: RandomState = Field(RandomState(), description="how random and complementary masks are drawn")

    @model_validator(mode="after")
    def _some_share(self) -> MixtureState:
        if self.trajectory_share + self.random_share + self.complementary_share == 0:
            raise ValueError("all shares are 0; raise trajectory_share, random_share or complementary_share")
        return self


StateSelection = Annotated[
    PerBlockState
    | GlobalState
    | AllRoundsState
    | RandomState
    | ComplementaryState
    | LiftState
    | SuffixState
    | MixtureState,
    Field(discriminator="kind"),
]


def needs_rounds(state: StateSelection) -> bool:
    """Whether states are selected from those that a rollout visited."""
    if isinstance(state, MixtureState):
        return state.trajectory_share > 0
    return not isinstance(state, RandomState | ComplementaryState | LiftState | SuffixState)


def random_masks(state: StateSelection) -> RandomState | None:
    """How the masks of a selection are drawn where they are random."""
    return state if isinstance(state, RandomState) else getattr(state, "masks", None)


def mixes_noise(state: StateSelection) -> bool:
    """Whether states may show other tokens than masks where they are trained."""
    masks = random_masks(state)
    return masks is not None and masks.mixes


def trains_twice(state: StateSelection) -> bool:
    """Whether a position may be trained in several states of a trajectory."""
    if isinstance(state, MixtureState):
        twice = state.complementary_share > 0 and state.masks.all_positions
        return twice or (state.trajectory_share > 0 and state.visited == "all_rounds")
    return isinstance(state, AllRoundsState) or (isinstance(state, ComplementaryState) and state.masks.all_positions)


class StudentSource(Section):
    """The student's own reverse unmasking, with the weights of the moment: on-policy."""

    kind: Literal["student"] = "student"


class OfflineSource(Section):
    """Responses of `data.responses`, such as the teacher's: off-policy. They have no rounds, so states are random."""

    kind: Literal["offline"] = "offline"


class ReplaySource(Section):
    """Rollouts of an earlier run, with their rounds: what `pipeline.spool` wrote, in `data.trajectories`."""

    kind: Literal["replay"] = "replay"


class ContinuedSource(Section):
    """The student goes on with the beginning of an offline response, which is context and not trained (TrOPD)."""

    kind: Literal["continued"] = "continued"
    max_share: float = Field(
        1.0, gt=0, le=1, description="the beginning is a uniformly drawn share of the response, up to this one"
    )


class MixtureSource(Section):
    """Each prompt takes its offline response with a probability that goes from `start` to `end`, else a rollout."""

    kind: Literal["mixture"] = "mixture"
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="how the offline share goes from start to end; constant: start throughout"
    )
    start: float = Field(1.0, ge=0, le=1, description="offline share of the first rollout batch")
    end: float = Field(0.0, ge=0, le=1, description="offline share from rollout batch `batches` on")
    batches: int = Field(100, ge=1, description="rollout batches until the share is `end`")
    offline_state: RandomState = Field(
        RandomState(), description="states of the offline responses; objective.state is that of the rollouts"
    )


Source = Annotated[
    StudentSource | OfflineSource | ContinuedSource | ReplaySource | MixtureSource, Field(discriminator="kind")
]


NEED_RESPONSES = ("offline", "continued", "mixture")


class TeacherTarget(Section):
    """The teacher's next-token distribution on the causal prefix, as it is or reshaped.

    Reshaping: divide the logits by `temperature`, keep the `top_k` best, of these the smallest set that holds `top_p`,
    of these the tokens with at least `min_p` times the best one's probability; what is cut gets probability 0, the
    rest is renormalised.
    """

    kind: Literal["teacher"] = "teacher"
    temperature: float = Field(1.0, ge=1e-3, le=100, description="of the teacher's softmax")
    top_k: int = Field(0, ge=0, description="keep the K most likely tokens; 0: off")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the smallest set with this probability; 1: off")
    min_p: float = Field(0.0, ge=0, lt=1, description="keep tokens with this share of the best one's; 0: off")

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def reshapes(self) -> bool:
        return self.truncates or self.temperature != 1


AS_IT_IS = TeacherTarget()


class HardTarget(Section):
    """The tokens of x0 themselves (SFT): no teacher is started."""

    kind: Literal["hard"] = "hard"


TargetChoice = Annotated[TeacherTarget | HardTarget, Field(discriminator="kind")]


class ForwardKL(Section):
    """D = KL(phi || p)."""

    kind: Literal["forward_kl"] = "forward_kl"


class ReverseKL(Section):
    """D = KL(p || phi)."""

    kind: Literal["reverse_kl"] = "reverse_kl"


class MixedKL(Section):
    """D = (1 - alpha) KL(phi || p) + alpha KL(p || phi)."""

    kind: Literal["mixed_kl"] = "mixed_kl"
    alpha: float = Field(0.5, ge=0, le=1, description="share of the reverse KL")


class JensenShannon(Section):
    """D = alpha KL(phi || m) + (1 - alpha) KL(p || m) with m = alpha phi + (1 - alpha) p."""

    kind: Literal["jensen_shannon"] = "jensen_shannon"
    alpha: float = Field(0.5, gt=0, lt=1, description="weight of phi in m; near 0 like forward, near 1 like reverse KL")


Divergence = Annotated[ForwardKL | ReverseKL | MixedKL | JensenShannon, Field(discriminator="kind")]


class NoOutliers(Section):
    """Every position has the divergence."""

    kind: Literal["none"] = "none"


class ForwardKLOutliers(Section):
    """Outside the trust region D is the forward KL over the teacher's best tokens, with objective.topk_tail (TrOPD)."""

    kind: Literal["forward_kl"] = "forward_kl"
    top_k: int = Field(64, ge=1, description="how many of the teacher's best tokens")


class LeftOutOutliers(Section):
    """Outside the trust region D is 0; such positions count in the normalisation all the same."""

    kind: Literal["left_out"] = "left_out"


Outliers = Annotated[NoOutliers | ForwardKLOutliers | LeftOutOutliers, Field(discriminator="kind")]


class ExtraTerms(Section):
    """Terms beside the divergence, each 0 (off) by default; all share its positions, weights and normalisation."""

    sharpening: float = Field(
        0.0, ge=0, description="times the student's entropy where its best token is the target's best (CAP)"
    )
    rank: float = Field(
        0.0,
        ge=0,
        description="times the mean, over pairs of masked positions of a block of which the rollout revealed one "
        "earlier, of max(0, H_earlier - H_later + rank_margin), H the student's entropy (TABOM)",
    )
    rank_margin: float = Field(0.0, ge=0, description="nats by which the earlier one's entropy should be lower")
    rank_window: int = Field(
        0,
        ge=0,
        description="rank what was revealed in so many rounds, from the earliest of the block's trained positions on; "
        "0: all of them",
    )
    alignment: float = Field(
        0.0, ge=0, description="times 1 - cosine of the student's and the teacher's final hidden states (REPR-ALIGN)"
    )
    alignment_of: Literal["final", "layers"] = Field(
        "final",
        description="what alignment compares; layers: all, or alignment_layers, made anew at the learner from a frozen "
        "copy of the ARLM, so that labels may be hard",
    )
    alignment_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="which layers: 0 is the embedding, the last the final hidden state; none: all"
    )
    alignment_weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="of these layers, in their order; none: all alike"
    )
    autoregressive: float = Field(
        0.0, ge=0, description="times the student's causal next-token cross-entropy on the clean response"
    )

    @property
    def aligns_layers(self) -> bool:
        """Whether more than the final hidden states of targets are aligned."""
        return self.alignment > 0 and self.alignment_of == "layers"

    def aligned(self, count: int) -> dict[int, float]:
        """The weights, which add up to 1, of the aligned ones of `count` layers, the embedding counted."""
        layers = self.alignment_layers or tuple(range(count))
        weights = self.alignment_weights or (1.0,) * len(layers)
        return {layer: weight / sum(weights) for layer, weight in zip(layers, weights, strict=True)}

    @model_validator(mode="after")
    def _each_layer_has_its_weight(self) -> ExtraTerms:
        layers, weights = self.alignment_layers, self.alignment_weights
        if layers and self.alignment_of != "layers":
            raise ValueError(f"alignment_layers {layers} is for alignment_of 'layers'; set that, or leave it out")
        if len(set(layers)) < len(layers):
            raise ValueError(f"alignment_layers {layers} names a layer twice; name each once")
        if weights and len(layers) != len(weights):
            raise ValueError(
                f"alignment_weights {weights} has not one weight for each of alignment_layers {layers}; list the "
                "layers, and a weight for each"
            )
        return self

    @property
    def needs_entropy(self) -> bool:
        return self.sharpening > 0 or self.rank > 0


_VISITED = ("per_block", "global", "all_rounds", "mixture")
_ROLLED_OUT = (*_VISITED, "random", "complementary")


def _cell(source: tuple[str, ...], state: tuple[str, ...], divergence: str) -> dict[str, tuple[str, ...]]:
    return {"source": source, "state": state, "target": ("teacher",), "divergence": (divergence,)}


class ExtraLoss(Section):
    """A loss beside the main one, with trajectories, states, target and divergence of its own; added `weight` times.

    Normalisation, `exclude_eos` and `topk_tail` are those of the main loss; its terms, clip and outliers are not.
    """

    source: Annotated[StudentSource | OfflineSource | ContinuedSource | ReplaySource, Field(discriminator="kind")] = (
        Field(StudentSource(), description="where its trajectories come from; student: rollouts of its own")
    )
    state: StateSelection = PerBlockState()
    target: TargetChoice = Field(TeacherTarget(), description="what the student is compared with")
    divergence: Divergence = ForwardKL()
    position_weight: Literal["one", "inverse_t"] = Field("one", description="as objective.weight of the main loss")
    weight: float = Field(1.0, ge=0, description="of this loss in the first rollout batch; the main one has 1")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how the weight goes to `end`; constant: it does not"
    )
    end: float = Field(0.0, ge=0, description="weight from rollout batch `batches` on")
    batches: int = Field(100, ge=1, description="rollout batches until the weight is `end`")


# terms that a method sets where they are not given
_METHOD_TERMS: dict[str, dict[str, float]] = {"tabom": {"rank": 1.0, "rank_margin": 0.1}}

# kinds of the choices that each method allows; the first is what it sets
_METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "opdlm": {
        "source": ("student",),
        "state": ("per_block", "global", "all_rounds", "mixture"),
        "target": ("teacher",),
    },
    "opdlm_off": {"source": ("student",), "state": ("random", "complementary"), "target": ("teacher",)},
    "off_policy_distillation": {"source": ("offline",), "state": ("random", "complementary"), "target": ("teacher",)},
    "sft": {"source": ("offline",), "state": ("random", "complementary"), "target": ("hard",)},
    "lift": {"source": ("offline",), "state": ("lift",), "target": ("hard",), "weight": ("inverse_t",)},
    "tabom": {"source": ("replay", "student"), "state": ("per_block", "global", "all_rounds"), "target": ("hard",)},
    "drafter": {"source": ("offline",), "state": ("suffix",), "target": ("teacher",)},
    "tropd": {**_cell(("student",), _ROLLED_OUT, "reverse_kl"), "outliers": ("forward_kl", "left_out")},
    # the four cells of prefixes from teacher or student times forward or reverse KL (arXiv 2605.16826)
    "kd": _cell(("offline",), ("random", "complementary"), "forward_kl"),
    "offline_rl": _cell(("offline",), ("random", "complementary"), "reverse_kl"),
    "dagger": _cell(("student",), _ROLLED_OUT, "forward_kl"),
    "opd": _cell(("student",), _ROLLED_OUT, "reverse_kl"),
}


class ObjectiveConfig(Section):
    """Which states are trained, and how the student is compared with the target there."""

    method: (
        Literal[
            "opdlm",
            "opdlm_off",
            "off_policy_distillation",
            "sft",
            "lift",
            "drafter",
            "tabom",
            "tropd",
            "kd",
            "offline_rl",
            "dagger",
            "opd",
        ]
        | None
    ) = Field(
        None,
        description="sets source, state, target and what else the method fixes by the name of a published method; "
        "the offline ones need data.responses. Default: the choices below as they are",
    )
    source: Source = Field(StudentSource(), description="where trajectories come from")
    state: StateSelection = PerBlockState()
    weight: Literal["one", "inverse_t"] = Field("one", description="inverse_t: 1 / (masked share of the block)")
    target: TargetChoice = Field(TeacherTarget(), description="what the student is compared with")
    divergence: Divergence = ForwardKL()
    topk_tail: Literal["drop", "renorm", "bucket"] = Field(
        "bucket",
        description="tokens outside the teacher's top-k: left out (may be negative), renormalised over the k, or "
        "one class of their own (a true KL, a lower bound of the full one)",
    )
    normalization: Literal["row_mean", "row_sum", "token_mean", "sum"] = Field(
        "row_mean",
        description="row_mean: mean over a row's positions, then over rows; row_sum: sum over a row's positions, then "
        "mean over rows; token_mean: mean over all positions; sum: neither",
    )
    exclude_eos: bool = Field(False, description="leave the end token out of the loss, as the released code does")
    clip_nats: float | None = Field(
        None, gt=0, description="a position's divergence counts up to this much; above, it gives no gradient"
    )
    importance_weight: bool = Field(
        False, description="times min(p_teacher / p_student, 1) of the token in x0, without gradient; target hidden"
    )
    outliers: Outliers = Field(
        NoOutliers(),
        description="what D is outside the trust region, in which a position is with probability "
        "min(p_teacher / p_student, 1) of the token in x0; target hidden",
    )
    terms: ExtraTerms = ExtraTerms()

    extra: tuple[ExtraLoss, ...] = Field(
        (),
        max_length=MOST_EXTRA,
        description="losses beside this one: [{source, state, target, divergence, weight, schedule}, ...], each with "
        "trajectories of its own",
    )

    @property
    def parts(self) -> tuple[ObjectiveConfig, ...]:
        """The main loss and the extra ones, each as an objective of its own."""
        alone = {
            "method": None,
            "clip_nats": None,
            "importance_weight": False,
            "outliers": NoOutliers(),
            "terms": ExtraTerms(),
            "extra": (),
        }
        chosen = ("source", "state", "target", "divergence")
        return (
            self.model_copy(update={"extra": ()}),
            *(
                self.model_copy(
                    update={**alone, "weight": e.position_weight, **{name: getattr(e, name) for name in chosen}}
                )
                for e in self.extra
            ),
        )

    @property
    def needs_teacher(self) -> bool:
        return any(part.target.kind == "teacher" for part in self.parts)

    @property
    def needs_responses(self) -> bool:
        return any(part.source.kind in NEED_RESPONSES for part in self.parts)

    @property
    def needs_trajectories(self) -> bool:
        return any(part.source.kind == "replay" for part in self.parts)

    @property
    def shape(self) -> TeacherTarget:
        """How the teacher's distribution is reshaped; not at all where there is none."""
        return self.target if isinstance(self.target, TeacherTarget) else AS_IT_IS

    @property
    def changes_positions(self) -> bool:
        """Whether anything but the plain divergence is computed from the logits."""
        return self.clip_nats is not None or self.importance_weight or self.routes or self.terms.needs_entropy

    @model_validator(mode="before")
    @classmethod
    def _apply_method(cls, data: Any) -> Any:
        method = data.get("method") if isinstance(data, dict) else None
        choices = _METHODS.get(method) if isinstance(method, str) else None
        if choices is None:
            return data
        named = {c: kinds[0] if c == "weight" else {"kind": kinds[0]} for c, kinds in choices.items()}
        if (terms := _METHOD_TERMS.get(str(method))) and isinstance(data.get("terms", {}), dict):
            named["terms"] = terms | data.get("terms", {})
            data = {name: value for name, value in data.items() if name != "terms"}
        return {**named, **data}

    @model_validator(mode="after")
    def _fits_method(self) -> ObjectiveConfig:
        for choice, kinds in _METHODS.get(self.method or "", {}).items():
            chosen = getattr(self, choice)
            field, kind = (choice, chosen) if isinstance(chosen, str) else (f"{choice}.kind", chosen.kind)
            if kind not in kinds:
                raise ValueError(
                    f"method {self.method!r} means {field} {' or '.join(kinds)}, but it is {kind!r}; "
                    f"remove {choice} or method"
                )
        return self

    @property
    def routes(self) -> bool:
        """Whether some positions have another divergence than the others."""
        return not isinstance(self.outliers, NoOutliers)

    @property
    def reads_difficulty(self) -> bool:
        """Whether the learner chooses among the masked tokens by the student's probabilities of them."""
        return isinstance(self.state, LiftState)

    @model_validator(mode="after")
    def _parts_make_sense(self) -> ObjectiveConfig:
        for i, part in enumerate(self.parts):
            place = f"extra.{i - 1}." if i else ""
            _check_rounds(place, part)
            _check_finite(place, part)
        return self

    @model_validator(mode="after")
    def _terms_have_what_they_need(self) -> ObjectiveConfig:
        teacherless = self.target.kind == "hard"
        for name, on in (
            ("importance_weight", self.importance_weight),
            ("outliers", self.routes),
            ("terms.alignment", self.terms.alignment > 0 and not self.terms.aligns_layers),
        ):
            if on and teacherless:
                raise ValueError(f"{name} compares with a teacher, and target.kind 'hard' has none; turn it off")
        window = getattr(self.state, "window", 0)
        if window and self.terms.rank_window > window:
            raise ValueError(
                f"terms.rank_window ({self.terms.rank_window}) is above state.window ({window}), but only trained "
                f"positions are ranked; lower it to {window} or less"
            )
        if self.terms.rank and self.source.kind == "offline":
            raise ValueError(
                f"terms.rank ({self.terms.rank}) ranks by the rounds in which a rollout revealed tokens, which "
                "source.kind 'offline' does not have; set it to 0, or use source.kind student or mixture"
            )
        return self


def _check_rounds(place: str, part: ObjectiveConfig) -> None:
    """Offline responses have no realised rounds; `place` is where the loss stands."""
    if part.source.kind == "offline" and needs_rounds(part.state):
        raise ValueError(
            f"{place}source.kind 'offline' has no realised rounds, which {place}state.kind {part.state.kind!r} selects "
            "from; use state.kind random, complementary, suffix or lift, or a mixture with trajectory_share 0"
        )


def _check_finite(place: str, part: ObjectiveConfig) -> None:
    if not isinstance(part.divergence, ReverseKL | MixedKL):
        return
    if isinstance(part.target, HardTarget):
        raise ValueError(
            f"{place}divergence.kind {part.divergence.kind!r} of the student from hard labels is infinite: the student "
            "gives other tokens some probability; use divergence.kind forward_kl (cross-entropy) or jensen_shannon"
        )
    if part.target.truncates:
        raise ValueError(
            f"{place}target.top_k, top_p and min_p give tokens probability 0, so that divergence.kind "
            f"{part.divergence.kind!r} is infinite; turn them off, or use forward_kl or jensen_shannon"
        )
