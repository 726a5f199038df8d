"""Makes data: rollout actors with the block-diffusion sampler, the teacher pool and evaluation."""
