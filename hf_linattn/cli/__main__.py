"""`python -m hf_linattn.cli`, the same as the command `hf-linattn`."""

from . import main

main()
