"""Read the rows of Parquet and Arrow files as dicts, with pyarrow, a few at a time."""

import os

from corpus.textfile import no_field

BATCH_BYTES = 1 << 20  # the rows of a batch, about


def read_parquet(path, reading):
    """Read rows a few at a time. Row groups to pass over are not read, which matters on the hub."""
    import pyarrow.parquet
    file = open_on_hub(path) if path.startswith('hf://') else open(path, 'rb')
    with file:  # without pre_buffer, a row group of any size is read in pieces
        parquet = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False,
                                              page_checksum_verification=True)
        check_columns(parquet.schema_arrow, reading.fields, path)
        n_bytes, n_rows = file.seek(0, os.SEEK_END), parquet.metadata.num_rows
        row, largest, groups = 0, 1, []
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            if not groups and reading.to_skip >= group.num_rows:
                reading.to_skip -= group.num_rows
                row += group.num_rows
            else:
                groups.append(number)
                largest = max(largest, group.total_byte_size // max(group.num_rows, 1))
        batch_size = min(max(BATCH_BYTES // largest, 1), 256)
        for batch in parquet.iter_batches(batch_size=batch_size, row_groups=groups, columns=reading.fields):
            for record in rows_of_batch(batch):
                row += 1
                reading.n_read = n_bytes * row // n_rows
                yield record, f'{path}, row {row}'
        reading.n_read = n_bytes


def open_on_hub(path):
    from huggingface_hub import HfFileSystem
    return HfFileSystem().open(path, block_size=32 << 20)  # the bytes of one request


def read_arrow(path, reading):
    import pyarrow
    with pyarrow.OSFile(path) as file:  # not mapped, because mapped pages count as memory of this process
        is_stream = file.read(6) != b'ARROW1'  # datasets writes the stream format, others the file format
        file.seek(0)
        reader = pyarrow.ipc.open_stream(file) if is_stream else pyarrow.ipc.open_file(file)
        check_columns(reader.schema, reading.fields, path)
        batches = reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
        row = 0
        for batch in batches:
            reading.n_read = file.tell()
            for record in rows_of_batch(batch):
                row += 1
                yield record, f'{path}, row {row}'
        reading.n_read = file.size()


def rows_of_batch(batch):
    for begin in range(0, batch.num_rows, 16):  # as Python's objects they take memory once more
        yield from batch.slice(begin, 16).to_pylist()


def check_columns(schema, fields, path):
    for field in fields or ():
        if field not in schema.names:
            raise no_field(path, field, schema.names)
        if 'string' not in str(schema.field(field).type):
            raise ValueError(f'{path}: field {field!r} holds {schema.field(field).type}, which is not text')
