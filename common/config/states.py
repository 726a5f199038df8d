"""Which partly masked states are trained, as configuration (common/states.py selects them)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.config.section import Section


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
    decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="weight of a masked token of a block, relative to the one before it: a draft is kept only where "
        "all before it are",
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
