"""Text classifiers made small with Pea-KD: a student with shared layers, distilled on two DeepSpeed engines."""

__version__ = "0.2.0"
