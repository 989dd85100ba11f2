"""Triton kernels of ltfast, each beside its torch oracle (imported as ltfast.kernels)."""
