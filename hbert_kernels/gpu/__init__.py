"""What the ops need on GPUs beside kernels: compositions of kernels and library products, and torch's own attention."""
