""" nanoarc: the simplest, fastest repository for training sequence models on ARC-AGI """
__version__ = "0.1.0"
