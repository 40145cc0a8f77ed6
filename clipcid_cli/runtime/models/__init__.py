"""All that knows open_clip, Hugging Face's and ONNX Runtime's models: names, towers, pixels, tokens."""
