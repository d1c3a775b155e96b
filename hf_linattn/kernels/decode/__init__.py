from .operator import Decoded, decode_step

__all__ = ["Decoded", "decode_step"]
