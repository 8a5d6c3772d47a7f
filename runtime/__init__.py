"""Everything that touches onnxruntime: sessions, evaluation, latency, profiles."""
