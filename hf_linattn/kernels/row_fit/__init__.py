from .native_kernel import fit_rows, fits_in_c

__all__ = ["fit_rows", "fits_in_c"]
