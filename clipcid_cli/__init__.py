"""clipcid: balance image-text data, cluster it, and distil a big CLIP into a small one."""

__version__ = "0.1.0"
