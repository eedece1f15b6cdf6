"""Bytes to a model's input: decoding, the display chain and preprocessing. No Ray and no torch in here."""
