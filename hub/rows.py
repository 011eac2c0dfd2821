"""Table rows of the layers that every torch checkpoint is made of; `source` and `target` are names without the leaf."""

from collections.abc import Iterable
from dataclasses import replace

from .mapping import Row

QKV = ("query", "key", "value")


def norm(source: str, target: str) -> tuple[Row, ...]:
    """LayerNorm, RMSNorm, GroupNorm."""
    return Row(f"{source}.weight", f"{target}/scale"), Row(f"{source}.bias", f"{target}/bias")


def dense(source: str, target: str) -> tuple[Row, ...]:
    """Linear [out, in] -> Dense [in, out]."""
    return Row(f"{source}.weight", f"{target}/kernel", "F D -> D F"), Row(f"{source}.bias", f"{target}/bias")


def conv(source: str, target: str) -> tuple[Row, ...]:
    """Conv2d [out, in, rows, columns] -> [rows, columns, in, out]."""
    return Row(f"{source}.weight", f"{target}/kernel", "D C X Y -> X Y C D"), Row(f"{source}.bias", f"{target}/bias")


def heads(source: str, target: str) -> tuple[Row, ...]:
    """Linear to attention heads [N H, D] -> [D, N, H]."""
    return (
        Row(f"{source}.weight", f"{target}/kernel", "(N H) D -> D N H"),
        Row(f"{source}.bias", f"{target}/bias", "(N H) -> N H"),
    )


def packed_heads(source: str, target: str, names: tuple[str, ...] = QKV) -> tuple[Row, ...]:
    """One Linear whose rows are those of several projections to heads, one after the other."""
    return (
        Row(f"{source}.weight", tuple(f"{target}/{name}/kernel" for name in names), "(N H) D -> D N H"),
        Row(f"{source}.bias", tuple(f"{target}/{name}/bias" for name in names), "(N H) -> N H"),
    )


def merge_heads(source: str, target: str) -> tuple[Row, ...]:
    """Linear from attention heads [D, N H] -> [N, H, D]."""
    return Row(f"{source}.weight", f"{target}/kernel", "D (N H) -> N H D"), Row(f"{source}.bias", f"{target}/bias")


def under(rows: Iterable[Row], source: str, target: str) -> list[Row]:
    """The rows with a prefix on both sides."""
    return [
        replace(row, source=source + row.source, target=tuple(target + path for path in row.targets)) for row in rows
    ]
