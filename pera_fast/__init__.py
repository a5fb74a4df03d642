"""pera-fast: the fastest way to pretrain a vision transformer on remote-sensing images with PerA (arXiv 2505.19447)."""

__version__ = "0.1.0"
