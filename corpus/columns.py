"""Read the rows of Parquet and Arrow files as dicts, with pyarrow."""

import os

from corpus.textfile import check_fields

BATCH_ROWS = 16  # few, because as Python's objects the rows take memory once more


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
        check_fields(reading.fields, parquet.schema_arrow.names, path)
        n_bytes, n_rows = file.seek(0, os.SEEK_END), parquet.metadata.num_rows
        group_rows = [parquet.metadata.row_group(n).num_rows for n in range(parquet.num_row_groups)]
        group = row = 0
        while group < len(group_rows) and reading.to_skip >= group_rows[group]:
            reading.to_skip -= group_rows[group]
            row += group_rows[group]
            group += 1
        for batch in parquet.iter_batches(BATCH_ROWS, range(group, len(group_rows)), reading.fields):
            for record in batch.to_pylist():
                row += 1
                reading.n_read = n_bytes * row // n_rows
                yield record, f'{path}, row {row}'
        reading.n_read = n_bytes


def read_arrow(path, reading):
    import pyarrow
    with pyarrow.OSFile(path) as file:  # not mapped, because mapped pages count as memory of this process
        is_stream = file.read(6) != b'ARROW1'  # datasets writes the stream format, others the file format
        file.seek(0)
        reader = pyarrow.ipc.open_stream(file) if is_stream else pyarrow.ipc.open_file(file)
        check_fields(reading.fields, reader.schema.names, path)
        row = 0
        for batch in reader if is_stream else map(reader.get_batch, range(reader.num_record_batches)):
            reading.n_read = file.tell()
            for begin in range(0, batch.num_rows, BATCH_ROWS):
                for record in batch.slice(begin, BATCH_ROWS).to_pylist():
                    row += 1
                    yield record, f'{path}, row {row}'
        reading.n_read = file.size()
