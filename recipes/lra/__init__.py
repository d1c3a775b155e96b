"""Long Range Arena: generators, readers of the published files, token ids and the model of its small protocol."""
