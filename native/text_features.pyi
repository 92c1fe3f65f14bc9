"""Compiled twin of `native.text_features_py`: the same function; documented there."""

from collections.abc import Sequence

from native.text_features_py import Float32, Int32, Int64

def extract(texts: Sequence[str], bits: int) -> tuple[Int64, Int32, Float32, Float32]: ...
