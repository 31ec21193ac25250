"""Few lengths of padded sequences, so that a network is compiled for few of them."""


def bucket_length(length: int, longest: int) -> int:
    """`length` rounded up to a multiple of a quarter of `longest`, at most `longest`."""
    quarter = -(-longest // 4)
    return min(-(-length // quarter) * quarter, longest)
