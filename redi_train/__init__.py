"""Two-stage training on right and wrong traces (SFT, then REDI) on top of transformers.Trainer."""
