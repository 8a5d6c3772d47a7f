"""The ONNX graph with gradients: what a network can do without, and how it gets its accuracy back."""
