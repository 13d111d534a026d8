"""Read the rows of Parquet and Arrow files as dicts, with pyarrow."""

from corpus.textfile import check_fields

BATCH_ROWS = 16  # few, because rows take more memory as Python objects


def read_parquet(path, reading):
    """Read rows a few at a time. Skipped row groups are not read, which matters on the hub."""
    import pyarrow.parquet
    if path.startswith('hf://'):
        from huggingface_hub import HfFileSystem
        reading.file = HfFileSystem().open(path, block_size=32 << 20)  # the bytes of one request
    else:
        reading.file = open(path, 'rb')
    with reading.file as file:  # without pre_buffer, a row group of any size is read in pieces
        parquet = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False,
                                              page_checksum_verification=True)
        check_fields(reading.fields, parquet.schema_arrow.names, path)
        row, groups = 0, list(range(parquet.num_row_groups))
        while groups and reading.to_skip >= parquet.metadata.row_group(groups[0]).num_rows:
            n_rows = parquet.metadata.row_group(groups.pop(0)).num_rows
            reading.to_skip -= n_rows
            row += n_rows
        for batch in parquet.iter_batches(BATCH_ROWS, groups, reading.fields):
            for record in batch.to_pylist():
                row += 1
                yield record, f'{path}, row {row}'


def read_arrow(path, reading):
    import pyarrow
    with pyarrow.OSFile(path) as file:  # not mapped, because mapped pages count as memory of this process
        reading.file = file
        is_file_format = file.read(6) == b'ARROW1'  # `datasets` writes the stream format
        file.seek(0)
        if is_file_format:
            reader = pyarrow.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            reader = batches = pyarrow.ipc.open_stream(file)
        check_fields(reading.fields, reader.schema.names, path)
        row = 0
        for batch in batches:
            for begin in range(0, batch.num_rows, BATCH_ROWS):
                for record in batch.slice(begin, BATCH_ROWS).to_pylist():
                    row += 1
                    yield record, f'{path}, row {row}'
