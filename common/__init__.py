"""What actors and learner must agree on: configuration, trajectories, masks, states and weights."""
