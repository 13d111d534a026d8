"""corpus/readers.py: every format from a file that its own library wrote, reading from any document on, and bad files."""
import bz2
import csv
import gzip
import json
import os
import random
import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from conftest import ROOT

from corpus import blocks, columns, readers, textfile, wiki
from corpus.readers import find_files, read_documents, read_text

SHARED = ROOT.parent / 'shared' / 'data' / 'chinese'
TITLES = ['北京', 'Two words', 'a,b', '"q"', '空格']
TEXTS = ['北京是中华人民共和国的首都。\n人口两千万。', 'one "quoted", two\tthree', 'e\u0301 and \u00e9', '𝄞 clef', 'last']
ROWS = [{'id': n, 'title': title, 'text': text} for n, (title, text) in enumerate(zip(TITLES, TEXTS))]


def write_jsonl(path):
    path.write_text(''.join(json.dumps(row, ensure_ascii=row['id'] % 2 == 0) + '\n' for row in ROWS), encoding='utf-8')


def write_json(path):
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(ROWS, file, indent=1)


def write_objects(path):
    """As WebQA is laid out."""
    path.write_text(json.dumps({f'Q_{row["id"]}': row for row in ROWS}, ensure_ascii=False), encoding='utf-8')


def write_csv(path):
    with open(path, 'w', encoding='utf-8-sig', newline='') as file:
        writer = csv.DictWriter(file, ['id', 'title', 'text'], dialect='excel' if path.name.endswith('.csv') else 'excel-tab')
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)


def write_dataset(path):
    pytest.importorskip('datasets').Dataset.from_list(ROWS).save_to_disk(path, num_shards=2)


def write_dataset_dict(path):
    datasets = pytest.importorskip('datasets')
    other = datasets.Dataset.from_list([{'id': 9, 'title': 'not', 'text': 'to be read'}])
    datasets.DatasetDict({'train': datasets.Dataset.from_list(ROWS), 'test': other}).save_to_disk(path)


WRITERS = {'a.jsonl': write_jsonl, 'a.json': write_json, 'b.json': write_objects, 'c.json': write_jsonl, 'a.csv': write_csv, 'a.tsv': write_csv,
           'a.parquet': write_parquet, 'dataset': write_dataset, 'dataset_dict': write_dataset_dict}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(readers, 'PART_CHARS', 50)
    monkeypatch.setattr(blocks, 'CHUNK_BYTES', 100)


def read(*paths, format='auto', **options):
    return list(read_documents(find_files(paths, format), **options))


def texts_of(*paths, **options):
    return [document.text for document in read(*paths, **options) if document.text]


@pytest.mark.parametrize('name', WRITERS)
def test_a_file_of_the_formats_own_library(tmp_path, monkeypatch, name):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    path = tmp_path / name
    WRITERS[name](path)
    assert texts_of(path) == TEXTS
    assert texts_of(path, fields=['title', 'text']) == [f'{title}\n{text}' for title, text in zip(TITLES, TEXTS)]
    for n in range(len(TEXTS) + 1):
        assert texts_of(path, start=n) == TEXTS[n:]
    n_bytes = sum(readers.n_bytes_of(file.path) for file in find_files([path]))
    assert all(0 < document.n_read <= n_bytes for document in read(path))


def zstd(data):
    pa = pytest.importorskip('pyarrow')
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, 'zstd') as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKERS = {'.gz': gzip.compress, '.bz2': bz2.compress, '.zst': zstd}


@pytest.mark.parametrize('ending', PACKERS)
def test_compressed_whole_cut_short_and_in_two_parts(tmp_path, small_parts, ending):
    path = tmp_path / f'a.jsonl{ending}'
    write_jsonl(tmp_path / 'a.jsonl')
    data = (tmp_path / 'a.jsonl').read_bytes()
    path.write_bytes(PACKERS[ending](data[:150]) + PACKERS[ending](data[150:]))
    assert texts_of(path) == TEXTS and texts_of(path, start=3) == TEXTS[3:]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(OSError, match=f'^{path} could not be read'):
        texts_of(path)


def test_standard_zstandard_is_read(tmp_path):
    zstandard = pytest.importorskip('zstandard')
    (tmp_path / 'a.txt.zst').write_bytes(zstandard.compress('北京'.encode()))
    assert texts_of(tmp_path) == ['北京']


def test_endings_in_capitals_and_linked_folders_are_read(tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'other').mkdir()
    (tmp_path / 'in' / 'A.JSONL.GZ').write_bytes(gzip.compress(b'{"text": "a"}'))
    (tmp_path / 'other' / 'b.txt').write_text('b')
    os.symlink(tmp_path / 'other', tmp_path / 'in' / 'linked')
    os.symlink(tmp_path / 'in', tmp_path / 'in' / 'round')
    assert texts_of(tmp_path / 'in') == ['a', 'b']


def test_an_object_that_begins_with_an_object_is_a_record(tmp_path):
    """As MongoDB exports them, one to a line; and as WebQA is laid out."""
    for name, content in (('a', '{"_id": {"$oid": "5f"}, "text": "a"}\n{"_id": {"text": "no"}, "text": "b"}'), ('b', '{"Q1": {"text": "c"}}'),
                          ('c', '{"Q1": {"text": "d"}, "Q2": {"text": "e"}, "Q3": {"text": "f"}}')):
        (tmp_path / f'{name}.json').write_text(content)
    assert texts_of(tmp_path) == list('abcdef')


def test_rows_as_long_as_books_are_read_few_at_a_time(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    texts = [f'{n}' + '书' * 300_000 for n in range(40)]
    pq.write_table(pa.table({'text': texts}), tmp_path / 'a.parquet', write_batch_size=1)
    sizes = []

    class Parquet(pq.ParquetFile):
        def iter_batches(self, *args):
            for batch in super().iter_batches(*args):
                sizes.append(batch.num_rows)
                yield batch
    monkeypatch.setattr(pq, 'ParquetFile', Parquet)
    assert texts_of(tmp_path) == texts and sum(sizes) == 40 and max(sizes) <= columns.BATCH_ROWS


def test_text_a_file_is_a_document_and_folders_go_by_name(tmp_path):
    for n, name in enumerate(['财经/2.txt', '财经/10.txt', '体育/1.txt', '体育/note.png', '.hidden/x.txt']):  # as THUCNews is laid out
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'第{n}篇\n\n正文', encoding='utf-8-sig')
    assert [os.path.relpath(path, tmp_path) for path, _ in find_files([tmp_path])] == ['体育/1.txt', '财经/10.txt', '财经/2.txt']
    assert texts_of(tmp_path) == [f'第{n}篇\n\n正文' for n in (2, 1, 0)]
    assert texts_of(tmp_path, format='paragraphs')[:3] == ['第2篇', '正文', '第1篇']
    assert texts_of(tmp_path, format='lines')[:3] == ['第2篇', '正文', '第1篇']


@pytest.mark.parametrize('format', ['text', 'paragraphs', 'lines'])
def test_a_large_text_is_cut_where_documents_or_lines_end(tmp_path, monkeypatch, format):
    draw = random.Random(1)
    text = ''.join(draw.choice(['一行文字', 'a line', ' ', '\n', '\n\n', '\r\n\r\n']) for _ in range(900))
    (tmp_path / 'a.txt').write_bytes(text.encode())
    at_once = texts_of(tmp_path, format=format)
    monkeypatch.setattr(readers, 'PART_CHARS', 50)
    parts = texts_of(tmp_path, format=format)
    text = text.replace('\r\n', '\n')
    if format == 'text':
        assert at_once == [text] == [''.join(parts)] and len(parts) > 20 and all(part.endswith('\n') for part in parts[:-1])
    elif format == 'lines':
        assert at_once == parts == [line for line in text.split('\n') if line]
    else:
        assert at_once == parts == [part.strip('\n') for part in re.split(r'\n(?:[^\S\n]*\n)+', text) if part.strip()]
    every = [document.text for document in read(tmp_path, format=format)]
    for n in (0, 7, len(every) - 1):
        assert [document.text for document in read(tmp_path, format=format, start=n)] == every[n:]


def test_a_text_without_line_ends_is_not_cut_in_a_character(tmp_path, small_parts):
    (tmp_path / 'a.txt').write_text('汉字' * 200, encoding='utf-8')
    parts = texts_of(tmp_path)
    assert ''.join(parts) == '汉字' * 200 and len(parts) == 8

# -----------------------------------------------------------------------------
# Wikipedia

WIKI = 'http://www.mediawiki.org/xml/export-0.11/'
BEIJING = """{{Infobox|name=北京|人口={{formatnum:21890000}}}}
[[File:Beijing.jpg|thumb|图片说明[[链接]]]]
'''北京市'''（{{lang-en|Beijing}}），是[[中华人民共和国|中国]]的[[首都]]<ref name="a">来源</ref>，-{zh-hans:软件; zh-hant:軟體}-业发达&nbsp;。<!-- 注释 -->

== 历史 ==
=== 古代 ===
* 战国
* 辽
{| class="wikitable"
|-
| 表格 || 内容
|}
== 参考文献 ==
{{reflist}}
[[分类:北京]]
[[Category:首都]]
__NOTOC__"""
PLAIN = '北京市，是中国的首都，软件业发达\xa0。\n\n历史\n\n古代\n战国\n辽'


def write_wiki(path, pages):
    """pages: (title, namespace, redirection or None, text)"""
    ET.register_namespace('', WIKI)
    root = ET.Element(f'{{{WIKI}}}mediawiki', {'version': '0.11'})

    def add(parent, tag, text=None, **attributes):
        element = ET.SubElement(parent, f'{{{WIKI}}}{tag}', attributes)
        element.text = text
        return element
    info = add(root, 'siteinfo')
    names = add(info, 'namespaces')
    for key, name in ((0, None), (6, 'Fichier'), (14, 'Catégorie')):
        add(names, 'namespace', name, key=str(key))
    for n, (title, namespace, redirection, text) in enumerate(pages):
        page = add(root, 'page')
        add(page, 'title', title)
        add(page, 'ns', str(namespace))
        add(page, 'id', str(n))
        if redirection:
            add(page, 'redirect', title=redirection)
        revision = add(page, 'revision')
        add(revision, 'model', 'wikitext')
        add(revision, 'format', 'text/x-wiki')
        add(revision, 'text', text, bytes=str(len(text.encode())))
    path.write_bytes(PACKERS.get(path.suffix, bytes)(ET.tostring(root, 'utf-8', xml_declaration=True)))


PAGES = [('北京', 0, None, BEIJING), ('京', 0, '北京', '#重定向 [[北京]]'), ('Talk:北京', 1, None, '讨论'), ('Old', 0, None, '#REDIRECT [[New]]'),
         ('Lyon', 0, None, 'Une [[ville]]. [[Fichier:x.jpg|vue]] [[:Catégorie:Villes]] [http://a.b Site] x < y & z')]


@pytest.mark.parametrize('name', ['a.xml', 'zhwiki-latest-pages-articles1.xml-p1p9.bz2'])
def test_wiki_is_plain_text_of_articles(tmp_path, small_parts, name):
    pytest.importorskip('mwparserfromhell')
    write_wiki(tmp_path / name, PAGES)
    assert texts_of(tmp_path / name, fields=['title', 'text']) == [f'北京\n{PLAIN}', 'Lyon\nUne ville.  Catégorie:Villes Site x < y & z']
    assert texts_of(tmp_path / name, start=1) == ['Une ville.  Catégorie:Villes Site x < y & z']


def test_a_wiki_without_its_parser_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mwparserfromhell', None)
    write_wiki(tmp_path / 'a.xml', PAGES)
    with pytest.raises(OSError, match=f'^{tmp_path}/a.xml needs a package that is not installed: pip install mwparserfromhell$'):
        texts_of(tmp_path / 'a.xml')


def test_a_wiki_section_without_text_loses_its_heading():
    pytest.importorskip('mwparserfromhell')
    text = '== A ==\n{{t}}\n== B ==\n=== C ===\n=== D ===\nd\n== E ==\ne'
    assert wiki.plain_text(text) == 'B\n\nD\nd\n\nE\ne'


@pytest.mark.parametrize('wikitext, plain', [
    ('-{zh-hans:软件; zh-hant:軟體;}-', '软件'), ('-{zh-tw:網路; zh-hk:網絡}-', '網路'), ('-{只有一种}-', '只有一种'), ('-{T|zh-cn:题; zh-tw:題}-正文', '正文'),
    ('-{H|zh-cn:题; zh-tw:題}-', ''), ('-{A|zh-cn:题; zh-tw:題}-', '题'), ('[[A|-{zh-cn:题; zh-tw:題}-]]', '题')])
def test_of_the_chinese_variants_the_simplified_one_is_taken(wikitext, plain):
    pytest.importorskip('mwparserfromhell')
    assert wiki.plain_text(wikitext) == plain

# -----------------------------------------------------------------------------
# folders of blocks

def write_block(folder, tokens, labels, mask=None):
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / 'token_float32.npy', np.asarray(tokens, dtype=np.float32))
    np.save(folder / 'label_float32.npy', np.asarray(labels, dtype=np.float32))
    if mask is not None:
        np.save(folder / 'loss_mask.npy', np.asarray(mask))


def rows(*paths):
    return [(ids.tolist(), mask.tolist()) for ids, mask in texts_of(*paths)]


def test_labels_that_follow_their_tokens_make_one_id_more(tmp_path):
    write_block(tmp_path / 'main' / '0', [[1, 2, 3], [4, 5, 6]], [[2, 3, 9], [5, 6, -100]])
    write_block(tmp_path / 'main' / '1', [[1, 2, 3]], [[2, 3, 4]], [[0, 1.0, 1]])
    assert rows(tmp_path / 'main') == [([1, 2, 3, 9], [0, 1, 1, 1]), ([4, 5, 6], [0, 1, 1]), ([1, 2, 3, 4], [0, 0, 1, 1])]


def test_blocks_of_one_token_a_row(tmp_path):
    write_block(tmp_path / '0', [[1], [2]], [[5], [-100]])
    assert rows(tmp_path) == [([1, 5], [0, 1]), ([2], [0])]


def test_labels_that_are_their_tokens_make_a_mask(tmp_path):
    write_block(tmp_path / '0', [[1, 2, 3]], [[-100, 2, 3]])
    assert rows(tmp_path) == [([1, 2, 3], [0, 1, 1])]


def test_blocks_continue_at_any_row(tmp_path, small_parts):
    tokens = np.arange(400).reshape(40, 10)
    write_block(tmp_path / '0', tokens[:30], tokens[:30] + 1)
    write_block(tmp_path / '1', tokens[30:], tokens[30:] + 1)
    assert [ids for ids, _ in rows(tmp_path)] == [list(range(n, n + 11)) for n in range(0, 400, 10)]
    for n in (1, 6, 30, 34):
        assert [ids[0] for ids, _ in texts_of(tmp_path, start=n)] == list(range(10 * n, 400, 10))


NEEDED = ': needed are whole numbers below 16,777,216, labels that are the tokens or the following ones, and a mask of 0 or 1'


@pytest.mark.parametrize('tokens, labels, mask, error', [
    ([[1, 2.5]], [[2, 3]], None, ', row 0, position 1: token_float32.npy 2.5, label_float32.npy 3.0' + NEEDED),
    ([[1, 2]], [[2, np.nan]], None, ', row 0, position 1: token_float32.npy 2.0, label_float32.npy nan' + NEEDED),
    ([[1, 2 ** 25]], [[2, 3]], None, ', row 0, position 1: token_float32.npy 33554432.0, label_float32.npy 3.0' + NEEDED),
    ([[1, 2]], [[2, 3]], [[1, 0.5]], ', row 0, position 1: token_float32.npy 2.0, label_float32.npy 3.0, loss_mask.npy 0.5' + NEEDED),
    ([[1, 2], [3, 4]], [[2, 3], [7, 5]], None, ', row 1, position 0: token_float32.npy 3.0, label_float32.npy 7.0' + NEEDED),
    ([[1, 2]], [[2, 3, 4]], None, ': token_float32.npy is float32 (1, 2), label_float32.npy is float32 (1, 3): numbers in equal shapes (rows, T) are needed'),
    ([1, 2], [2, 3], None, ': token_float32.npy is float32 (2,), label_float32.npy is float32 (2,): numbers in equal shapes (rows, T) are needed'),
    ([[1, 2]], [[2, 3]], [[1]], ': token_float32.npy is float32 (1, 2), label_float32.npy is float32 (1, 2), loss_mask.npy is int64 (1, 1): numbers in equal shapes (rows, T) are needed')])
def test_blocks_that_are_wrong(tmp_path, tokens, labels, mask, error):
    write_block(tmp_path / '0', tokens, labels, mask)
    with pytest.raises(ValueError) as caught:
        rows(tmp_path)
    assert str(caught.value) == f'{tmp_path}/0/token_float32.npy{error}'


def test_blocks_of_unequal_length_are_found_before_the_first_is_read(tmp_path):
    write_block(tmp_path / '0', [[1, 2.5]], [[2, 3]])
    write_block(tmp_path / '1', [[1, 2, 3]], [[2, 3, 4]])
    with pytest.raises(ValueError, match='^{0}/1/{1} has rows of 3 tokens, {0}/0/{1} of 2: pack them one by one$'.format(tmp_path, 'token_float32.npy')):
        rows(tmp_path)


def test_no_pickle_is_opened(tmp_path):
    write_block(tmp_path / '0', [[1, 2]], [[2, 3]])
    np.save(tmp_path / '0' / 'label_float32.npy', np.array([[{}, 1]], dtype=object), allow_pickle=True)
    with pytest.raises(OSError, match='could not be read .Array can.t be memory-mapped: Python objects in dtype'):
        rows(tmp_path)

# -----------------------------------------------------------------------------
# what is wrong in a file

@pytest.mark.parametrize('name, content, error', [
    ('a.txt', b'one\ntwo\n\xff\n', ', line 3: not UTF-8 (invalid start byte): convert it to UTF-8, name its encoding with --encoding, or use corpus.pack --errors=replace'),
    ('a.jsonl', b'{"text": "a"}\n{"text": "\xe5\x8c"}', ', line 2: not UTF-8 (invalid continuation byte): it is gb18030: convert it to UTF-8, or use --encoding=gb18030'),
    ('a.csv', b'text\na\n\xff\n', ', line 3: not UTF-8'), ('a.json', b'["a",\n"\xff"]', ', line 2: not UTF-8'),
    ('a.xml', b'<mediawiki>\n\xff</mediawiki>', ', line 2: not UTF-8'),
    ('a.jsonl', b'{"text": "a"}\n\n{"title": "b", "id": 1}\n', ", line 3: no field 'text' with text, only title, id: name the field to take with --field"),
    ('a.jsonl', b'{"text": "a"}\n{"text": "b"\n', ", line 2: not JSON (Expecting ',' delimiter: line "),
    ('a.jsonl', b'{"text": 5}\n', ", line 1: field 'text' holds 5, which is not text"),
    ('a.jsonl', b'[1, 2]\n', ', line 1: an object or a string is needed, not [1, 2]'),
    ('a.jsonl', b'[' * 100_000, ', line 1: not JSON ('),
    ('a.json', b'[{"text": "a"}, {"text": "b"', ", record 2: not JSON: parse error: premature EOF"),
    ('a.json', b'["a" "b"]', ", record 2: not JSON: parse error: after array element, I expect ',' or ']'"),
    ('a.json', b'["a",', ', record 2: not JSON: parse error: premature EOF'),
    ('a.json', b'[{"txt": "a"}]', ", record 1: no field 'text' with text, only txt"),
    ('a.csv', b'title,body\na,b\n', ": no field 'text' with text, only title, body: name the field to take with --field"),
    ('a.csv', b'text,id\na,1\nb\n', ', line 3: 1 fields where the first row names 2'),
    ('a.csv', b'text\n"a\n', ', line 2: not a table of values: unexpected end of data'),
    ('a.csv', b'', ": no field 'text' with text, only none at all"),
    ('a.xml', b'<rss></rss>', ': its first element is <rss>, not the <mediawiki> of a MediaWiki dump'),
    ('a.xml', b'<mediawiki>\n<page><ns>0', ', line 2: not XML, or cut short: no element found'),
    ('a.parquet', b'PAR1 and more', ' could not be read ('), ('a.arrow', b'nothing', ' could not be read ('),
    ('a.jsonl.gz', b'no gzip', ' could not be read (Not a gzipped file'),
    ('a.parquet.gz', b'', ': Parquet and Arrow have their own compression: unpack this file'),
    ('a.json', b'{"a": {"text": "x"}, "b": {"text": "y"}, "c": "z"}', ", record 3: not JSON: 'z' is not an object, as the values before it are (if each line is a record, use --format=jsonl)"),
    ('a.json', b'[{"text": "a"}] ["b"]', ', record 2: not JSON: parse error: trailing garbage (if each line is a record, use --format=jsonl)'),
    ('a.jsonl', json.dumps({str(n): '' for n in range(99)}).encode(), ", line 1: no field 'text' with text, only " + ', '.join(map(str, range(20))) + ': '),
])
def test_what_is_wrong_is_one_line_that_says_where(tmp_path, name, content, error):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError)) as caught:
        texts_of(path)
    assert str(caught.value).startswith(f'{path}{error}') and '\n' not in str(caught.value)


def test_replace_puts_a_mark_where_strict_raises(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'one\xff')
    (tmp_path / 'b.jsonl').write_bytes(b'{"text": "two\xff"}\n{"text": "\\ud83d three"}')  # half a surrogate pair
    (tmp_path / 'c.csv').write_bytes(b'text\nfour\xff\n')
    (tmp_path / 'd.json').write_bytes(b'["five\xff"]')
    assert texts_of(tmp_path, errors='replace_all') == ['one\ufffd', 'two\ufffd', '? three', 'four\ufffd', 'five\ufffd']


@pytest.mark.parametrize('name, format', [('a.jsonl', 'auto'), ('a.csv', 'auto'), ('a.json', 'auto'), ('a.txt', 'paragraphs')])
def test_a_record_without_end_does_not_fill_the_memory(tmp_path, monkeypatch, name, format):
    monkeypatch.setattr(textfile, 'MAX_RECORD_CHARS', 5000)
    (tmp_path / name).write_bytes({'a.json': b'["', 'a.csv': b'text\n'}.get(name, b'') + b'x' * 100_000)
    with pytest.raises(ValueError, match=' of more than 0 Mi characters|field larger than'):
        texts_of(tmp_path / name, format=format)


CHINESE = '人民日报：前去北京。如日中天，全国群众。\n第二行，然后再见。\n'
TRADITIONAL = '人民日報：前去臺灣。如日中天，全國群眾。\n第二行，然後再見。\n'


@pytest.mark.parametrize('encoding, text', [('gb18030', CHINESE), ('gb18030', CHINESE + '㐀𠀀'), ('gb18030', TRADITIONAL), ('big5', TRADITIONAL), ('utf-16', CHINESE)])
@pytest.mark.parametrize('name', ['a.txt', 'a.csv', 'a.jsonl.gz', 'a.json', 'a.xml'])
def test_another_encoding_is_read_if_named_and_named_if_not(tmp_path, encoding, text, name):
    content = {'.txt': text, '.csv': f'text\r\n"{text}"\r\n', '.gz': json.dumps({'text': text}, ensure_ascii=False),
               '.json': json.dumps([{'text': text}], ensure_ascii=False),
               '.xml': f'<mediawiki><page><ns>0</ns><title>t</title><text>{text}</text></page></mediawiki>'}[os.path.splitext(name)[1]]
    path = tmp_path / name
    path.write_bytes(PACKERS.get(path.suffix, bytes)(content.encode(encoding)))
    assert [text.rstrip() for text in texts_of(path, encoding=encoding)] == [text.rstrip()]
    if encoding == 'utf-16':  # its byte order mark tells it
        assert texts_of(path) == texts_of(path, encoding='utf-16')
        return
    with pytest.raises(ValueError) as caught:
        texts_of(path)
    assert re.fullmatch(f'{path}, line \\d: not UTF-8 .*: it is {encoding}: convert it to UTF-8, or use --encoding={encoding}', str(caught.value))


def test_an_encoding_that_nobody_knows(tmp_path):
    (tmp_path / 'a.txt').write_text('a')
    with pytest.raises(ValueError, match='^--encoding=gbk2: unknown encoding, examples are utf-8, gb18030'):
        texts_of(tmp_path, encoding='gbk2')


@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
def test_every_line_end_is_read_as_a_line_feed(tmp_path, end):
    text = '一' + end + '二' + end + end + '三'
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbf' + text.encode())
    (tmp_path / 'b.csv').write_bytes(f'text{end}"{text}"{end}'.encode())
    (tmp_path / 'c.jsonl').write_bytes((json.dumps({'text': text}) + end + json.dumps(text)).encode())
    (tmp_path / 'd.json').write_bytes(json.dumps([text]).encode())
    assert texts_of(tmp_path) == ['一\n二\n\n三'] * 5
    assert texts_of(tmp_path / 'a.txt', format='paragraphs') == ['一\n二', '三']
    assert texts_of(tmp_path / 'a.txt', format='lines') == ['一', '二', '三']
    assert read_text(tmp_path / 'a.txt') == '一\n二\n\n三'


def test_replaced_characters_are_counted_and_many_of_them_refused(tmp_path, capsys):
    path = tmp_path / 'a.txt'
    path.write_bytes(b'x' * 199 + b'\xff')
    assert texts_of(path, errors='replace') == ['x' * 199 + '\ufffd']
    assert capsys.readouterr().out == f'{path}: 1 of 200 characters became U+FFFD, because they are not utf-8\n'
    path.write_bytes(CHINESE.encode('gb18030') * 9)
    with pytest.raises(ValueError, match=r'% of its characters are not utf-8, and --errors=replace takes up to 1%: it is gb18030: convert'):
        texts_of(path, errors='replace')
    assert '\ufffd' in texts_of(path, errors='replace_all')[0]


def test_a_file_of_continuation_bytes_is_one_line(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'\x80' * 1_500_000)
    with pytest.raises(ValueError, match='a.txt, line 1: not UTF-8 .invalid start byte.: convert it to UTF-8'):
        texts_of(tmp_path)


def test_files_of_other_endings_are_named(tmp_path, capsys):
    for name in ('a.txt', 'b.md', 'c.md', 'd', 'e.npy', '.hidden'):
        (tmp_path / name).write_text('text')
    assert texts_of(tmp_path) == ['text']
    assert capsys.readouterr().out == f'{tmp_path}: files of other endings are not read: .md (2), .npy (1), no ending (1)\n'


@pytest.mark.parametrize('content, texts', [
    ('{"data": [{"text": "a"}, {"text": "b"}]}', ['a', 'b']), ('{"version": "1", "data": [{"text": "a"}], "n": 1}', ['a']),
    ('{"rows": ["a", "b"]}', ['a', 'b']), ('{"text": ["a", "b"]}', ['a\nb']), ('{"text": "a"} "c"', ['a', 'c']), ('[]', [])])
def test_layouts_of_json(tmp_path, content, texts):
    (tmp_path / 'a.json').write_text(content)
    assert texts_of(tmp_path) == texts


@pytest.mark.parametrize('content', ['[' * 100_000, '{"a":' * 100_000, '[{"text": ' + '[' * 100_000])
def test_json_that_is_nested_deep_is_one_line(tmp_path, content):
    (tmp_path / 'a.json').write_text(content)
    with pytest.raises(ValueError, match='a.json, record 1: not JSON: nested more than 200 deep .if each line'):
        texts_of(tmp_path)


def test_a_start_counts_documents_over_all_files(tmp_path):
    for n, name in enumerate(['a.jsonl', 'b.jsonl', 'c.jsonl']):
        write_jsonl(tmp_path / name)
    for n in range(16):
        assert texts_of(tmp_path, start=n) == (TEXTS * 3)[n:]


def write_row_groups(path, texts):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    pq.write_table(pa.table({'text': texts, 'n': list(range(len(texts)))}), path, row_group_size=50, write_page_checksum=True)


def test_parquet_that_datasets_streams(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    datasets = pytest.importorskip('datasets')
    for name in ('a.parquet', 'b.parquet'):
        write_row_groups(tmp_path / name, [name * n for n in range(120)])
    rows = datasets.load_dataset('parquet', data_files={'train': [str(tmp_path / 'a.parquet'), str(tmp_path / 'b.parquet')]}, split='train', streaming=True)
    assert [document.text for document in read(tmp_path)] == [row['text'] for row in rows]


def test_row_groups_before_the_start_are_not_read(tmp_path):
    path = tmp_path / 'a.parquet'
    write_row_groups(path, [f'{n}' * 99 for n in range(120)])
    broken = bytearray(path.read_bytes())
    broken[4:500] = bytes(496)
    path.write_bytes(broken)
    assert texts_of(path, start=50) == [f'{n}' * 99 for n in range(50, 120)]
    with pytest.raises(OSError, match=f'^{path} could not be read'):
        texts_of(path)


def test_urls_in_wiki_text():
    pytest.importorskip('mwparserfromhell')
    assert wiki.plain_text('See https://a.b/c?d=e and [https://f.g Title] or [https://h.i].') == 'See https://a.b/c?d=e and Title or .'


def test_a_format_that_cannot_be_told_is_asked_for(tmp_path):
    (tmp_path / 'wiki_00').write_text('{"text": "a"}', encoding='utf-8')
    with pytest.raises(ValueError, match=f'^{tmp_path}/wiki_00: its ending does not tell its format: name it with --format, one of text, '):
        find_files([tmp_path / 'wiki_00'])
    with pytest.raises(ValueError, match=f'^{tmp_path}: nothing to read in this folder'):
        find_files([tmp_path])
    assert texts_of(tmp_path, format='jsonl') == ['a']
