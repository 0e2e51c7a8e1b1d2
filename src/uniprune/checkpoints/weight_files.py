"""Files of weights, in whatever format they are: what a pruned checkpoint takes none of from the dense one."""

from __future__ import annotations

from fnmatch import fnmatchcase

PATTERNS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.ckpt.*", "*.npy", "*.npz", "*.pte"),  # PyTorch, NumPy
    *("*.h5", "*.msgpack", "*.tflite", "saved_model.pb"),  # TensorFlow, Flax
    *("*.gguf", "*.ggml", "*.llamafile", "*.ot", "*.onnx", "*.onnx.data", "*.onnx_data*"),
    *("*.nemo", "*.pdparams", "*.params", "*.mlmodel"),  # NeMo, Paddle, MXNet, Core ML
    *("*.keras", "*.task", "*.litertlm", "*.ptl", "*.t7", "*.joblib", "*.dduf"),  # Keras, LiteRT, PyTorch Mobile, Torch 7
    *("*.engine", "*.trt"),  # TensorRT
    *("*.bin.*", "*.gguf.*", "*.mlmodelc.zip"),  # parts of them, or packed
)
"""Of file names in lower case."""


def has_weights(name: str) -> bool:
    """Whether a file of this name holds weights."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in PATTERNS)
