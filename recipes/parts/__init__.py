"""What the scripts of the recipes share: flags, data, models, training, checkpoints and what is written at the end."""
