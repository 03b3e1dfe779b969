"""Reads Parquet as a stream of rows, with pyarrow, which is an extra of this package.

A Parquet file says at its end where everything is: it is put into an unnamed file on the disk first. Rows are read in
batches, by one thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

from modelyard.datasets.recognition import PARQUET_REMEDY
from modelyard.errors import InvalidDataset

BATCH_ROWS = 256


def rows_of_parquet(blocks: Iterator[bytes], scratch: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, which must be whole before the first one is there.

    Raises:
        InvalidDataset: pyarrow is not installed (`extra_missing`), or the file is damaged.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InvalidDataset(
            "The file is Parquet, which this server reads with an extra that is not installed: python "
            "requirements/install.py parquet (or pip install pyarrow, into the server's environment). Or "
            f"{PARQUET_REMEDY}.",
            code="extra_missing",
        ) from None
    with tempfile.TemporaryFile(dir=scratch) as file:
        for block in blocks:
            file.write(block)
        file.seek(0)
        try:
            for batch in parquet.ParquetFile(file).iter_batches(BATCH_ROWS, use_threads=False):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, ValueError, NotImplementedError, OSError) as error:
            raise InvalidDataset(
                f"The Parquet file is damaged or not whole: {str(error)[:200]}.", code="archive_damaged"
            ) from None
