"""PEA-KD for BERT: a parameter-sharing student distilled from a frozen teacher by two DeepSpeed engines."""

__version__ = "0.1.0"
