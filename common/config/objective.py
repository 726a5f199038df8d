"""The objective's five choices as configuration: trajectory source, state selection, weight, target, divergence.

    L = E_{tau ~ source, t ~ state} sum_b sum_{i in M(x_t^b)} w(t) D(phi^i(.|x0) || p_theta^i(.|x0^{<b}, x_t^b))

(OPDLM, arXiv 2606.06712, section 2 of the method's specification.) Each is combined freely with the others; what makes
no sense is refused with the reason.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.config.divergences import Divergence, ForwardKL, MixedKL, NoOutliers, Outliers, ReverseKL
from common.config.section import Section
from common.config.sources import (
    NEED_RESPONSES,
    ContinuedSource,
    MixtureSource,
    OfflineSource,
    ReplaySource,
    Source,
    StudentSource,
)
from common.config.states import LiftState, PerBlockState, StateSelection, SuffixState, needs_rounds
from common.config.targets import AS_IT_IS, HardTarget, TargetChoice, TeacherTarget
from common.config.terms import ExtraTerms

MOST_EXTRA = 4  # losses beside the main one, each of which has metrics

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
    "drafter": {"source": ("offline", "mixture"), "state": ("suffix",), "target": ("teacher",)},
    "tropd": {**_cell(("student",), _ROLLED_OUT, "reverse_kl"), "outliers": ("forward_kl", "left_out")},
    # the four cells of prefixes from teacher or student times forward or reverse KL (arXiv 2605.16826)
    "kd": _cell(("offline",), ("random", "complementary"), "forward_kl"),
    "offline_rl": _cell(("offline",), ("random", "complementary"), "reverse_kl"),
    "dagger": _cell(("student",), _ROLLED_OUT, "forward_kl"),
    "opd": _cell(("student",), _ROLLED_OUT, "reverse_kl"),
}


def set_by_method(method: Any, choice: str) -> dict[str, str]:
    """The kind that a method gives a choice among sections (`source`, `state`, ...); empty if it leaves it open."""
    kinds = _METHODS.get(method, {}).get(choice) if isinstance(method, str) else None
    return {"kind": kinds[0]} if kinds and choice != "weight" else {}  # which is a plain field


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
    def teacher_shape(self) -> TeacherTarget:
        """How the first loss that has a teacher reshapes its distribution."""
        return next((part.shape for part in self.parts if part.target.kind == "teacher"), AS_IT_IS)

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
        named: dict[str, Any] = {c: set_by_method(method, c) or kinds[0] for c, kinds in choices.items()}
        if (terms := _METHOD_TERMS.get(str(method))) and isinstance(data.get("terms", {}), dict):
            named["terms"] = terms | data.get("terms", {})
            data = {name: value for name, value in data.items() if name != "terms"}
        # fields without a kind are of the kind that the method sets
        given = {c: set_by_method(method, c) | value if isinstance(value, dict) else value for c, value in data.items()}
        return {**named, **given}

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
        if isinstance(self.source, MixtureSource) and isinstance(self.state, SuffixState):
            if given := self.source.offline_state.model_dump(exclude_defaults=True):
                name = min(given)
                raise ValueError(
                    f"source.offline_state.{name} ({given[name]!r}) is not used: state.kind 'suffix' is also that of "
                    "offline responses; leave offline_state out"
                )
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
