"""Everything that touches Transformers' internals: attention and mask functions, and where models keep their layers."""
