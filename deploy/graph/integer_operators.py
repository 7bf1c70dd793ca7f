"""The operators with which ONNX Runtime multiplies integers."""

PRODUCT, CONVOLUTION = "MatMulIntegerToFloat", "QLinearConv"  # those that deploy/graph/integer_kernels.py writes
INTEGER_PRODUCTS = frozenset({PRODUCT, "MatMulInteger", "QLinearMatMul", "QGemm"})
INTEGER_CONVOLUTIONS = frozenset({CONVOLUTION, "ConvInteger"})
