"""Everything that touches Transformers' internals: attention and mask functions, where models keep layers."""
