"""Export: the quantized graph as ONNX with Q/DQ nodes, checked in ONNX Runtime."""
