"""The prompts of a rollout batch, with what is known of their responses: offline ones, beginnings, and extra losses."""

from __future__ import annotations

from common.config.run import RunConfig
from common.config.sources import ContinuedSource
from common.prompts import Prompt, PromptSet, longest_response
from common.responses import for_extra_losses, offline_share, with_prefixes, with_responses
from deploy.curriculum import extra_weights


def prompts_of_batch(
    config: RunConfig, known: PromptSet, batch: list[Prompt], index: int, limit: int, block_size: int
) -> list[Prompt]:
    """Of `batch`, whose number is `index`: some with a response from a file or with the beginning of one, as the
    objective's source has it, and behind them those of its extra losses. `limit` is the batch's on response tokens."""
    share = offline_share(config.objective.source, index)
    samples = config.rollout.samples_per_prompt
    stored = known.trajectories if config.objective.source.kind == "replay" else known.responses
    prompts = with_responses(batch, share, stored, samples, config.seed)

    def longest(prompt: Prompt) -> int:
        return longest_response(prompt, limit, config.data.domain_max_tokens, block_size)

    if isinstance(config.objective.source, ContinuedSource):
        most = config.objective.source.max_share
        prompts = with_prefixes(prompts, most, known.responses, longest, config.seed)
    weights = extra_weights(config.objective, index)
    return prompts + for_extra_losses(
        batch, config.objective, weights, known.responses, samples, config.seed, longest, known.trajectories
    )
