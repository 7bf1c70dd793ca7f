"""What stands in for a GPU: a CUDA driver over host memory, and TensorRT's real bindings without its libraries."""
