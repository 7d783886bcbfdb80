"""Kernels beyond those that PyTorch ships, for the operations in ops/. Imported only when used."""
