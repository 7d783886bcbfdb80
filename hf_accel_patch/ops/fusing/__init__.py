"""What a function does on a GPU, noted once and launched as few kernels: its small operators together, in Triton."""
