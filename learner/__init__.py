"""Uses data: packing, the objective, the DeepSpeed ZeRO-3 ranks, publishing and checkpoints."""
