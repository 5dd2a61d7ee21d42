"""Small numerical kernels that several algorithms share."""
