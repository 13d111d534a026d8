"""Read the rows of Parquet and Arrow files as dicts, with pyarrow, a few at a time."""

import os

from corpus.textfile import check_fields

BATCH_BYTES = 1 << 20  # the rows of a batch, about


def read_parquet(path, reading):
    """Read rows a few at a time. Row groups to pass over are not read, which matters on the hub."""
    import pyarrow.parquet
    if path.startswith('hf://'):
        from huggingface_hub import HfFileSystem
        file = HfFileSystem().open(path, block_size=32 << 20)  # the bytes of one request
    else:
        file = open(path, 'rb')
    with file:  # without pre_buffer, a row group of any size is read in pieces
        parquet = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False,
                                              page_checksum_verification=True)
        check_columns(parquet.schema_arrow, path, reading)
        groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
        n_bytes, n_rows = file.seek(0, os.SEEK_END), parquet.metadata.num_rows
        first_group = first_row = 0
        while first_group < len(groups) and reading.to_skip >= groups[first_group].num_rows:
            reading.to_skip -= groups[first_group].num_rows
            first_row += groups[first_group].num_rows
            first_group += 1

        row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
        batches = parquet.iter_batches(batch_size=min(max(BATCH_BYTES // max(row_bytes, 1), 1), 256),
                                       row_groups=range(first_group, len(groups)), columns=reading.fields)
        rows = (row for batch in batches for row in rows_of_batch(batch))
        for number, row in enumerate(rows, first_row + 1):
            reading.n_read = n_bytes * number // n_rows
            yield row, f'{path}, row {number}'
        reading.n_read = n_bytes


def read_arrow(path, reading):
    import pyarrow
    with pyarrow.OSFile(path) as file:  # not mapped, because mapped pages count as memory of this process
        is_stream = file.read(6) != b'ARROW1'  # datasets writes the stream format, others the file format
        file.seek(0)
        reader = pyarrow.ipc.open_stream(file) if is_stream else pyarrow.ipc.open_file(file)
        check_columns(reader.schema, path, reading)
        batches = reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
        rows = (row for batch in batches for row in rows_of_batch(batch))
        for number, row in enumerate(rows, 1):
            reading.n_read = file.tell()
            yield row, f'{path}, row {number}'
        reading.n_read = file.size()


def rows_of_batch(batch):
    for begin in range(0, batch.num_rows, 16):  # as Python's objects they take memory once more
        yield from batch.slice(begin, 16).to_pylist()


def check_columns(schema, path, reading):
    check_fields(reading.fields, schema.names, path)
    for field in reading.fields or ():
        if 'string' not in str(schema.field(field).type):
            raise ValueError(f'{path}: field {field!r} holds {schema.field(field).type}, which is not text')
