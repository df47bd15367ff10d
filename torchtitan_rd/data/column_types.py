"""What arrow says the cells of a column are, where it has several types for one kind."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def is_integer(type_: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_integer(type_)


def is_list(type_: "pa.DataType") -> bool:
    """Whether an arrow type is a list of any kind."""
    import pyarrow as pa

    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)


def is_text(type_: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)
