"""Folders and files of models: open_clip, Hugging Face, ONNX."""
