"""Time and memory of the attention kinds beside softmax attention and other libraries. See docs/performance.md."""
