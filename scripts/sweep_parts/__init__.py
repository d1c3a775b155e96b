"""Parts of architecture_sweep: tiny configs, their inputs, what a kind does with a model, the table."""
