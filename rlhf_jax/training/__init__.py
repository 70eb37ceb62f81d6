"""What every training run needs: a step, an optimizer, checkpoints, a run folder."""
