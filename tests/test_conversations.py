"""corpus/dialogue.py, template.py and conversations.py: every layout to turns, turns to ids and mask, and those to rows."""

import gzip
import json
import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import checkpoint
from corpus import conversations as chat
from corpus.dialogue import Passage, answered, read_conversations
from corpus.pack import write_dataset
from corpus.template import Template
from kernels import IGNORE
from model import GPT, GPTConfig
from tokens.dataset import read_meta
from tokens.loader import Loader
from tokens.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, GPT2Tokenizer, load_tokenizer
from tokens.tokenizer_json import read_tokenizer_json

SHARED = ROOT.parent / 'shared' / 'data'
BYTES = ByteTokenizer()


# A BPE without role tokens, as GPT-2's, in which a token may reach over anything: blanks, line ends, the end of a heading.
MERGED = BPETokenizer('\n'.join(['Ċ Y', ': Ċ', 'Ċ Ċ', 'Ċ Ġ', 'Ġ Ġ', 'Ġ Y', 'ĊY e', 'Ċ .', ': ĊY', 'Ċ #', 'Ċ <', 'Ċ w', 'Ċ t']), r'[\s\S]+', ['<|endoftext|>'])


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding='utf-8')
    return path


@pytest.fixture(scope='session')
def other(tmp_path_factory):
    """A file of one conversation, for validation."""
    return write(tmp_path_factory.mktemp('other') / 'other.csv', 'question,answer\nelse?,no\n')


def encode(turns, tokenizer, style, size):
    return Template(tokenizer, style).fit(turns, size)


def read(tmp_path, name, content):
    return [turns for _, turns, _ in read_conversations([write(tmp_path / name, content)])]


# -----------------------------------------------------------------------------
# layouts


QA = [('user', 'q'), ('assistant', 'a')]
QCA = [('user', 'q'), ('context', 'c'), ('assistant', 'a')]


@pytest.mark.parametrize('name, content, expected', [
    ('dolly.jsonl', '{"instruction": "q", "context": "c", "response": "a", "category": "closed_qa"}\n'
                    '{"instruction": "q", "context": "", "response": "a", "category": "open_qa"}\n', [QCA, QA]),
    ('alpaca.json', [{'instruction': 'q', 'input': 'c', 'output': ' a\n'}, {'instruction': 'q', 'input': '', 'output': 'a'}], [QCA, QA]),
    ('messages.jsonl', '{"topic": "ai", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, '
                       '{"role": "assistant", "content": "a"}]}\n\n', [[('system', 's'), *QA]]),
    ('webqa.json', {'Q_TRN_1': {'question': 'q', 'evidences': {'Q_TRN_1#00': {'answer': ['no_answer'], 'evidence': 'c'},
                                                               'Q_TRN_1#01': {'answer': ['a'], 'evidence': 'c'}}}},
     [[*QCA[:2], ('assistant', '')], QCA]),
    ('dureader.json', '{"question_id": 7, "question": "q", "question_type": "ENTITY", "answers": ["a", "b"], "documents": ['
                      '{"is_selected": false, "title": "t", "paragraphs": ["x"], "most_related_para": 0}, '
                      '{"is_selected": true, "title": "t", "paragraphs": ["x", "c"], "most_related_para": 1}]}\n', [QCA]),
    ('squad.json', {'version': 'v1', 'data': [{'title': 't', 'paragraphs': [{'context': 'c', 'qas': [
        {'id': '1', 'question': 'q', 'answers': [{'text': 'a', 'answer_start': 0}]},
        {'id': '2', 'question': 'q', 'answers': [], 'is_impossible': True}]}]}]}, [QCA, [*QCA[:2], ('assistant', '')]]),
    ('hub.jsonl', '{"id": "1", "title": "t", "context": "c", "question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 2]}}', [QCA]),
    ('cmrc.json', [{'context_id': 'T1', 'context_text': 'c', 'title': 't', 'qas': [{'query_id': '1', 'query_text': 'q', 'answers': ['a', 'a']}]}], [QCA]),
    ('flat.jsonl', '{"id": "1", "context": "c", "question": "q", "answer": "a"}\n', [QCA]),
    ('dureader.csv', 'question,answer,context\nq,a,c\n"q","a",\n', [QCA, QA]),
    ('dureader.tsv', '\ufeffquestion\tanswers\nq\ta\n', [QA]),
    ('prompts.jsonl', '{"prompt": "q"}\n', [[('user', 'q'), ('assistant', '')]]),
    ('none.json', {'Q_TRN_1': {'question': 'q', 'evidences': {}}}, [[]]),  # to be counted as one without an answer
    ('alpaca.json', [{'instruction': 'q', 'context': 'c', 'output': 'a', 'text': 'the whole prompt', 'system': 's'}], [[('system', 's'), *QCA]]),
    ('history.json', [{'instruction': 'q', 'input': '', 'output': 'a', 'history': [['h', 'i'], ['j', 'k']]}],
     [[('user', 'h'), ('assistant', 'i'), ('user', 'j'), ('assistant', 'k'), *QA]]),
    ('both.json', [{'instruction': 'q', 'input': 'c', 'context': 'd', 'output': 'a'}], [[QA[0], ('context', 'd\n\nc'), QA[1]]]),
    ('trl.jsonl', '{"prompt": "q", "completion": "a"}', [QA]),
    ('trl_chat.json', [{'prompt': [{'role': 'user', 'content': 'q'}], 'completion': [{'role': 'assistant', 'content': 'a'}]}], [QA]),
    ('orca.json', [{'id': 'x', 'system_prompt': 's', 'question': 'q', 'response': 'a'}], [[('system', 's'), *QA]]),
    ('sharegpt.json', [{'id': 'x', 'system': 's', 'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]}], [[('system', 's'), *QA]]),
    ('minimind.jsonl', '{"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}', [QA]),
    ('tool.json', [{'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'f()'}, {'role': 'tool', 'content': 'c'},
                                 {'role': 'assistant', 'content': 'a'}]}], [[QA[0], ('assistant', 'f()'), ('context', 'c'), QA[1]]]),
    ('parts.json', [{'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'q'}]}, {'role': 'assistant', 'content': 'a'}]}], [QA]),
    ('wrapped.json', {'data': [{'prompt': 'q', 'response': 'a'}]}, [QA]),
    ('wrapped_too.json', {'examples': [{'prompt': 'q', 'response': 'a'}] * 3}, [QA] * 3),
    ('blank.json', [{'instruction': 'q', 'input': ' \n', 'output': 'a'}], [QA]),
    ('starts.json', [{'question': 'q', 'context': 'c', 'answers': {'text': ['a', 'b'], 'answer_start': []}}], [QCA]),
    ('same.json', [{'prompt': 'q', 'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]}], [QA]),  # as UltraChat
    ('prompts.txt', 'q\n\nr\n', [[('user', 'q'), ('assistant', '')], [('user', 'r'), ('assistant', '')]]),
    ('windows.csv', 'question,answer\r\n"q\r\nr",a\r\n', [[('user', 'q\nr'), ('assistant', 'a')]]),
])
def test_layouts(tmp_path, name, content, expected):
    assert read(tmp_path, name, content) == expected


@pytest.mark.parametrize('file, n, first', [
    ('sft/chatterbot_english.jsonl', 2026, [('user', 'What is AI?'), ('assistant', 'Artificial Intelligence is the branch of engineering '
                                                                      'and science devoted to constructing machines that think.')]),
    ('chinese/cmrc2018_dev_1500.jsonl', 1500, None),
])
def test_layouts_of_real_files(file, n, first):
    if not (SHARED / file).exists():
        pytest.skip(f'{SHARED / file} is absent')
    found = [turns for _, turns, _ in read_conversations([SHARED / file])]
    assert len(found) == n and first in (None, found[0]) and all(turns[0][0] in ('user', 'assistant') for turns in found)


@pytest.mark.parametrize('name, content, text', [
    ('x.jsonl', '{"messages": []}\n{"frage": "q"}', 'line 2: its fields are frage: needed is one of messages, conversations, conversation, instruction, '),
    ('x.jsonl', '{"prompt": "q"}\n{"prompt": ', 'line 2: not JSON (Expecting value'),
    ('x.json', '[\n {"prompt": "q"},\n {"prompt": "r"\n]', 'record 2: not JSON: parse error: '),
    ('x.json', '[' * 99_999, 'record 1: not JSON: nested more than 200 deep'),
    ('x.json', '[{"instruction": "q", "output": 5}]', 'record 1: its answer is a int, where a text is needed'),
    ('x.json', '{"a": {"question": "q", "evidences": {"b": 7}}}', "record 1: TypeError argument of type 'int' is not iterable in a nested field: python"),
    ('x.json', '[{"question": "q", "paragraphs": [{"context": "c", "qas": [{"question": "r", "answers": []}]}]}]', "record 1: its field 'question' has content outside and inside of its qas"),
    ('x.json', '[{"messages": [{"role": "narrator", "content": "q"}]}]', "record 1: the role 'narrator' is none of system, developer, user, human, "),
    ('x.json', '[7]', 'record 1: a int, where an object with fields is needed'),
    ('x.csv', 'question,answer\nq,a\nq\n', 'line 3: 1 fields where the first row names 2'),
    ('x.json', b'[{"prompt": "\xff"}]', 'line 1: not UTF-8 (invalid start byte): convert it to UTF-8'),
    # content that no layout uses is named, not dropped
    ('x.json', '[{"instruction": "q", "output": "a", "chosen": "c"}]', "record 1: its field 'chosen' has content that the layout of instruction, output does not use"),
    ('x.json', '[{"messages": [{"role": "user", "content": "q"}], "prompt": [{"role": "user", "content": "r"}]}]', "record 1: its field 'prompt' has content"),
    ('x.json', '[{"question": "q", "answer": "a", "tools": "[{}]"}]', "record 1: its field 'tools' has content"),
    ('x.json', '[{"instruction": "q", "question": "r", "answer": "a"}]', 'record 1: its fields instruction and question both hold the question'),
    ('x.json', '[{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]}]', "record 1: a message of assistant has 'tool_calls'"),
    ('x.json', '[{"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]}]', 'record 1: its content has a part that is not text: {"type": "image"'),
    ('x.json', '[{"instruction": "q", "output": "a", "history": ["x"]}]', 'record 1: its history is not a list of [question, answer]'),
    ('x.json', '[{"instruction": "q", "output": "a", "history": "x"}]', 'record 1: its history is not a list of [question, answer]'),
])
def test_files_that_cannot_be_read_end_in_one_line(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        list(read_conversations([tmp_path / name]))
    assert str(error.value).startswith(f'{tmp_path / name}, {text}')


# -----------------------------------------------------------------------------
# ids and mask


def test_this_tokenizer_would_merge_a_prompt_and_its_answer():
    assert MERGED.decode([MERGED.encode('### Response:\nYes')[-2]]) == '\nYe'


TRICKY = ['Yes', ' Yes', '.\n\n### Response:\n', '\n\n  answer', 'é', '是的', '👍🏽', '<|endoftext|>', '<|assistant|>Yes', '### User:\nwhat']


@pytest.mark.parametrize('answer', TRICKY)
@pytest.mark.parametrize('style', ['chat', 'alpaca'])
@pytest.mark.parametrize('question', ['what is the answer', 'the answer is \n\n', '<|user|>'])
def test_the_mask_is_the_answer_and_its_end_whatever_could_merge(answer, style, question):
    for tokenizer in (BYTES, MERGED):
        turns = [('user', question), ('context', ' the '), ('assistant', answer), ('user', answer), ('assistant', question)]
        ids, mask, *lost = encode(turns, tokenizer, style, 10_000)
        assert lost[:2] == [0, 0]
        assert ids[mask == 1].tolist() == [*tokenizer.encode(answer), tokenizer.eot, *tokenizer.encode(question), tokenizer.eot]
        user, assistant = {'chat': ('### User:\n', '### Assistant:\n'), 'alpaca': ('### Instruction:\n', '### Response:\n')}[style]
        context, gap = {'chat': '', 'alpaca': '### Context:\n'}[style], '\n\n'
        if tokenizer is BYTES and style == 'chat':
            assert [i for i in ids if i >= 256] == [BYTES.special[f'<|{name}|>'] for name in ('user', 'assistant', 'endoftext') * 2]
            user, assistant, gap = '', '', ''
            context = '\n\n'
        prompt = ids[(mask == 0) & (ids < tokenizer.vocab_size - len(tokenizer.special))]
        assert tokenizer.decode(prompt) == f'{user}{question}{gap}{context} the {gap}{assistant}{user}{answer}{gap}{assistant}'
        # what sample.py gives the model is what the model was trained to answer
        first, nothing, *_ = encode(turns[:2], tokenizer, style, 10_000)
        assert first.tolist() == ids[:len(first)].tolist() and mask[len(first)] == 1 and not nothing.any()


def test_long_conversations_lose_context_then_old_exchanges_then_the_question():
    def text(turns, size):
        fitted = encode(turns, BYTES, 'chat', size)
        if fitted is None:
            return None
        ids, mask, n_left_out, n_cut, _ = fitted
        assert len(ids) <= size and ids[-1] == BYTES.eot
        return chat.as_text(ids, mask, BYTES, False), n_left_out, n_cut
    question = [('user', 'who?'), ('context', 'abcdefgh'), ('assistant', 'me')]
    assert text(question, 19) == ('<|user|>who?\n\nabcdefgh<|assistant|>⟦me<|endoftext|>⟧', 0, 0)
    assert text(question, 14) == ('<|user|>who?\n\nfgh<|assistant|>⟦me<|endoftext|>⟧', 0, 1)
    assert text(question, 9) == ('<|user|>o?\n\n<|assistant|>⟦me<|endoftext|>⟧', 0, 2)
    assert text(question, 6) is None
    turns = [('system', 'S'), ('user', '1'), ('assistant', '2'), ('user', '3'), ('assistant', '4'), ('user', '56'), ('assistant', '7')]
    assert text(turns, 18)[1:] == (0, 0) and text(turns, 17)[1:] == (2, 0)
    assert text(turns, 13) == ('<|system|>S<|user|>3<|assistant|>⟦4<|endoftext|>⟧<|user|>56<|assistant|>⟦7<|endoftext|>⟧', 2, 0)
    assert text(turns, 7) == ('<|system|>S<|user|>6<|assistant|>⟦7<|endoftext|>⟧', 4, 1)


def test_what_is_not_answered():
    user, answer, empty = ('user', 'q'), ('assistant', 'a'), ('assistant', '')
    assert answered([user, answer, user, empty, user, answer]) == [user, answer]
    assert answered([user, answer, user]) == [user, answer]
    assert answered([user, empty]) == answered([user]) == answered([]) == []


def test_a_long_chat_is_encoded_a_few_times_for_each_question(monkeypatch):
    """Once for each dropped exchange took half a second at 400 turns, and 16 times that for four times the turns."""
    template, encode, n_encoded = Template(BYTES, 'chat'), Template.encode, []
    monkeypatch.setattr(Template, 'encode', lambda self, turns: n_encoded.append(len(turns)) or encode(self, turns))
    turns = [('system', 'Be brief.'), *[('user', 'How much?'), ('assistant', 'So much.')] * 300, ('user', 'And now?')]
    fitted = template.fit(turns, 100)
    assert len(n_encoded) < 25
    kept = len(turns) + 1 - fitted.n_left_out  # with the opened answer
    assert fitted.ids.tolist() == encode(template, [turns[0], *turns[len(turns) + 2 - kept:], ('assistant', None)])[0]
    assert len(fitted.ids) <= 100 < len(encode(template, [turns[0], *turns[len(turns) - kept:], ('assistant', None)])[0])


# -----------------------------------------------------------------------------
# rows


def test_best_fit_fills_rows():
    assert chat.best_fit([5, 2, 3, 4, 1], 6) == [[0, 4], [1, 3], [2]]
    lengths = np.random.default_rng(0).integers(1, 100, size=400).tolist()
    rows = chat.best_fit(lengths, 128)
    assert sorted(i for row in rows for i in row) == list(range(400)) and all(sum(lengths[i] for i in row) <= 128 for row in rows)
    assert len(rows) <= 1.02 * sum(lengths) / 128


def packed(tmp_path, n=60, block_size=40, **settings):
    """A dataset of n short conversations of three lengths, and the ids of each."""
    records = [{'messages': [{'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': str(i) * (1 + i % 3 * 4)}]} for i in range(n)]
    file = write(tmp_path / 'x.json', records)
    chat.build(tmp_path / 'x', BYTES, [file], block_size=block_size, **{**dict(val=0.2), **settings})
    return tmp_path / 'x', [encode(turns, BYTES, settings.get('style', 'chat'), block_size + 1) for _, turns, _ in read_conversations([file])]


def test_a_dataset_holds_every_conversation_once_and_its_rows_begin_with_one(tmp_path, capsys):
    folder, encoded = packed(tmp_path)
    meta, pieces = read_meta(folder), []
    assert (meta['row_tokens'], meta['style']) == (41, 'chat')
    for split in ('train', 'val'):
        ids, mask = np.fromfile(folder / f'{split}.bin', '<u2'), np.fromfile(folder / f'{split}.mask', np.uint8)
        table = np.fromfile(folder / f'{split}.idx', '<i8').reshape(-1, 2)
        assert ids.size == mask.size == meta['splits'][split]['tokens'] and ids.size % 41 == 0
        assert set(range(0, ids.size, 41)) <= set(table[:, 0].tolist()), 'rows begin with a conversation'
        outside = np.ones(ids.size, dtype=bool)
        for offset, length in table.tolist():
            pieces.append((ids[offset:offset + length].tolist(), mask[offset:offset + length].tolist()))
            assert offset // 41 == (offset + length - 1) // 41
            outside[offset:offset + length] = False
        assert (ids[outside] == BYTES.special['<|pad|>']).all() and not mask[outside].any()
    assert sorted(pieces) == sorted((ids.tolist(), mask.tolist()) for ids, mask, *_ in encoded)
    chat.show(folder, 'train', 1)
    shown = capsys.readouterr().out.split('---')[-1]
    assert 'row 0 of' in shown and '<|user|>' in shown and shown.count('⟦') == shown.count('<|endoftext|>⟧') > 0
    # the same files the next time
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    packed(tmp_path)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_loader_shows_whole_rows_in_every_order_and_world_size(tmp_path):
    folder, _ = packed(tmp_path)
    rows = np.fromfile(folder / 'train.bin', '<u2').reshape(-1, 41).astype(int)
    targets = np.fromfile(folder / 'train.mask', np.uint8).reshape(-1, 41)
    want = sorted((row[:-1].tolist(), np.where(mask[1:], row[1:], IGNORE).tolist()) for row, mask in zip(rows, targets))
    for order in ('shuffle', 'sequential', 'documents'):
        loader = Loader(folder, 'train', block_size=40, batch_size=1, order=order)
        assert loader.n_windows == len(rows)
        x, y, _ = loader.windows(np.arange(len(rows)))
        assert sorted(zip(x.tolist(), y.tolist())) == want
        assert (x.tolist() == rows[:, :-1].tolist()) == (order == 'sequential')
    whole = Loader(folder, 'train', block_size=40, batch_size=4, seed=3)
    parts = [Loader(folder, 'train', block_size=40, batch_size=2, rank=rank, world_size=2, seed=3) for rank in range(2)]
    for step in range(9):
        x = torch.cat([part.batch(step)[0] for part in parts])
        assert torch.equal(x, whole.batch(step)[0])
        assert whole.count_targets(step) == parts[0].count_targets(step) == int((whole.batch(step)[1] != IGNORE).sum())
    x, _, _ = Loader(folder, 'train', block_size=40, batch_size=8, order='random').batch(0)
    assert all(row in rows[:, :-1].tolist() for row in x.tolist())


def test_rows_and_plain_text_mix(tmp_path):
    folder, _ = packed(tmp_path)
    write_dataset(tmp_path / 'plain', BYTES, {'train': ['some text ' * 60], 'val': ['other text ' * 9]}, 'a test')
    mixed = Loader([folder, tmp_path / 'plain'], 'train', block_size=40, batch_size=8, weights=[0.75, 0.25])
    x, y, _ = mixed.batch(0)
    assert sorted((row >= 256).any() for row in x.numpy()) == [False] * 2 + [True] * 6
    both = Loader([folder, tmp_path / 'plain'], 'val', block_size=40, batch_size=8, order='sequential')
    x, y, _ = both.windows(np.arange(both.n_windows))
    n_rows = read_meta(folder)['splits']['val']['tokens'] // 41
    assert both.n_windows == n_rows + 3 and int((y[n_rows:] != IGNORE).sum()) == len('other text ' * 9) - 1


def test_another_block_size_is_one_line(tmp_path):
    folder, _ = packed(tmp_path)
    with pytest.raises(ValueError) as error:
        Loader(folder, 'train', block_size=64, batch_size=4)
    assert str(error.value) == f'{folder} was packed in rows for block_size 40: use --block_size=40, or pack it again with --block_size 64'


def test_rows_without_their_mask_are_refused(tmp_path):
    folder, _ = packed(tmp_path)
    (folder / 'val.mask').unlink()
    Loader(folder, 'train', block_size=40, batch_size=4)
    with pytest.raises(FileNotFoundError, match=re.escape(str(folder / 'val.mask'))):
        Loader(folder, 'val', block_size=40, batch_size=4)


def test_equal_questions_and_all_of_a_context_stay_in_one_split(tmp_path):
    records = [{'question': f'{i % 20}?', 'answer': str(i)} for i in range(100)] + [
        {'question': f'{i}!', 'answer': str(i), 'context': f'text {i % 20}'} for i in range(100)] + [
        {'messages': [{'role': role, 'content': text} for role, text in (('user', f'{i % 20}?'), ('assistant', 'a'), ('user', str(i)), ('assistant', 'b'))]}
        for i in range(100)]
    chat.build(tmp_path / 'x', BYTES, [write(tmp_path / 'x.json', records)], block_size=40, val=0.3)
    keys = {}
    for split in ('train', 'val'):
        text = chat.as_text(np.fromfile(tmp_path / f'x/{split}.bin', '<u2'), np.fromfile(tmp_path / f'x/{split}.mask', np.uint8), BYTES, False)
        keys[split] = set(re.findall(r'(\d+\?|text \d+)<', text))
    assert not keys['train'] & keys['val'] and len(keys['train'] | keys['val']) == 40 and len(keys['val']) > 5


def test_what_is_left_out_is_counted_and_with_v_named(tmp_path, capsys, other):
    file = write(tmp_path / 'x.jsonl', '\n'.join(json.dumps({'instruction': 'q' * n, 'response': 'a' * m}) for n, m in [(1, 1), (2, 0), (3, 90), (90, 2)]))
    chat.build(tmp_path / 'x', BYTES, [file], block_size=40, val=[other], verbose=True)
    out = capsys.readouterr()
    for line, what in ((2, 'left out, having no answer'), (3, 'left out, the answer alone being longer than a row'), (4, 'cut to fit a row')):
        assert f'{what}: 1\n' in out.out and f'{file}, line {line}: {what}\n' in out.out + out.err
    assert 'x/train: conversations: 2, in 2 rows of 41 tokens; 5 targets (6.1%), ' in out.out


def test_what_is_asked_for_validation_is_not_trained_on(tmp_path, capsys):
    train = write(tmp_path / 'x.json', [{'question': q, 'answer': 'a'} for q in 'uvwvx'])
    chat.build(tmp_path / 'x', BYTES, [train], block_size=40, val=[write(tmp_path / 'y.json', [{'question': 'v', 'answer': 'b'}])])
    assert '\n2 about what the validation files ask, left out of training\n' in '\n' + capsys.readouterr().out
    assert [read_meta(tmp_path / 'x')['splits'][split]['documents'] for split in ('train', 'val')] == [3, 1]


def test_nothing_for_a_split_and_a_tokenizer_without_end(tmp_path):
    file = write(tmp_path / 'x.json', [{'question': 'q', 'answer': 'a'}])
    for settings, text in ((dict(val=0.01), 'there is no conversation for the val split: give --val FILE, or another --val_fraction'),
                           (dict(val=1.0), 'there is no conversation for the train split: give more, or a larger --block_size'),
                           (dict(tokenizer=CharTokenizer('aq')), 'a char tokenizer has no end-of-text token, so no answer could end: '
                                                                'conversations need gpt2, byte, or a trained tokenizer')):
        with pytest.raises(ValueError) as error:
            chat.build(tmp_path / 'x', **{**dict(tokenizer=BYTES, paths=[file], block_size=40), **settings})
        assert str(error.value) == text
    assert not (tmp_path / 'x').exists()


def test_the_command_line(tmp_path):
    file = write(tmp_path / 'x.json', [{'question': f'q{i}', 'answer': 'ä'} for i in range(40)])
    model = GPT(GPTConfig(block_size=16, vocab_size=BYTES.vocab_size, n_layer=1, n_head=2, n_embd=16))
    state = dict(model=model.state_dict(), optimizer={}, model_args=vars(model.config), iter_num=7, config={}, tokenizer=BYTES.meta(),
                 vocab_size=BYTES.vocab_size, format=checkpoint.FORMAT)
    checkpoint.CheckpointFolder(tmp_path).save(state)

    def run(*arguments):
        return subprocess.run([sys.executable, ROOT / 'corpus/conversations.py', *map(str, arguments)], capture_output=True, text=True, encoding='utf-8', cwd=tmp_path)
    done = run('build', '--input', file, '--tokenizer', tmp_path / 'ckpt.pt', '--block_size', '60', '--style', 'alpaca', '--out', 'y', '--val_fraction', '0.3')
    assert done.returncode == 0 and f'config/finetune_small.py --init_from={tmp_path / "ckpt.pt"} --dataset=' in done.stdout
    assert done.stdout.endswith(' --out_dir=out-y\n')  # that recipe resumes what its out_dir holds
    assert '### Instruction:\nq' in run('show', 'y', '--rows', '1').stdout
    model.save_pretrained(tmp_path / 'folder', BYTES)
    done = run('build', '--input', file, '--tokenizer', tmp_path / 'folder', '--block_size', '60', '--out', 'z', '--val_fraction', '0.3')
    assert f'next: python train.py config/finetune_qwen3.py --init_from={tmp_path / "folder"} --dataset=' in done.stdout
    gone, end = os.pipe()
    os.close(gone)  # as `| head` leaves it, for a terminal without these characters
    done = subprocess.run([sys.executable, ROOT / 'corpus/conversations.py', 'show', 'y'], stdout=end, stderr=subprocess.PIPE, cwd=tmp_path,
                          env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    os.close(end)
    assert (done.returncode, done.stderr) == (141, b'')
    bad = run('build', '--input', file, '--tokenizer', tmp_path / 'nothing.pt', '--out', 'y')
    assert (bad.returncode, bad.stderr) == (2, f'{tmp_path / "nothing.pt"}: No such file or directory\n')
    assert run('show', tmp_path).returncode == 2


DOLLY = [  # the fields of databricks-dolly-15k.jsonl
    {'instruction': 'When did Virgin Australia start operating?', 'context': "Virgin Australia commenced services on 31 August 2000.",
     'response': 'Virgin Australia commenced services on 31 August 2000.', 'category': 'closed_qa'},
    {'instruction': 'Which is a species of fish? Tope or Rope', 'context': '', 'response': 'Tope', 'category': 'classification'},
]
WEBQA = {'Q_TRN_010878': {'question': '勇敢的心霍啸林的父亲是谁', 'evidences': {
    'Q_TRN_010878#05': {'answer': ['no_answer'], 'evidence': '《勇敢的心》是一部电视剧。'},
    'Q_TRN_010878#06': {'answer': ['霍绍昌'], 'evidence': '霍啸林的父亲霍绍昌是商会会长。'}}}}
DUREADER = '问题编号,question,answer,context\n1,天空为什么是蓝的,"因为瑞利散射,蓝光散射得更多。",太阳光穿过大气。\n2,没有答案的,,x\n'


@pytest.mark.parametrize('name, file, content, shown', [
    ('dolly', 'databricks-dolly-15k.jsonl', '\n'.join(map(json.dumps, DOLLY)), '### Instruction:\nWhich is a species of fish? Tope or Rope\n\n'
     '### Response:\n⟦Tope<|endoftext|>⟧'),
    ('webqa', 'me_train.json', json.dumps(WEBQA), '<|user|>勇敢的心霍啸林的父亲是谁\n\n霍啸林的父亲霍绍昌是商会会长。<|assistant|>⟦霍绍昌<|endoftext|>⟧'),
    ('dureader', 'dureader.csv', DUREADER, '<|user|>天空为什么是蓝的\n\n太阳光穿过大气。<|assistant|>⟦因为瑞利散射,蓝光散射得更多。<|endoftext|>⟧'),
])
def test_prepare_scripts_pack_files_of_the_real_schema(tmp_path, monkeypatch, capsys, other, name, file, content, shown):
    path = write(tmp_path / file, content)
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--input', str(path), '--val', str(other), '--tokenizer', 'byte', '--block_size', '300', '--out', str(tmp_path / 'x')])
    runpy.run_path(str(ROOT / 'data' / name / 'prepare.py'), run_name='__main__')
    out = capsys.readouterr().out
    assert ('left out, having no answer: 1 (-v names them)\n' in out) == (name != 'dolly')
    chat.show(tmp_path / 'x', 'train', 1)
    assert shown in capsys.readouterr().out


def test_dolly_comes_from_a_mirror_of_the_hub(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr('corpus.fetch.fetch', lambda name, sources, sha256: asked.append(*sources) or write(
        tmp_path / name, '\n'.join(json.dumps({**DOLLY[1], 'instruction': str(i)}) for i in range(99))))
    monkeypatch.setenv('HF_ENDPOINT', 'https://mirror/')
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--tokenizer', 'byte', '--block_size', '90', '--out', str(tmp_path / 'x')])
    runpy.run_path(str(ROOT / 'data/dolly/prepare.py'), run_name='__main__')
    [address] = asked
    assert re.fullmatch(r'https://mirror/datasets/databricks/databricks-dolly-15k/resolve/[0-9a-f]{40}/databricks-dolly-15k.jsonl', address)


def test_isolated_conversations_of_a_row_carry_their_number(tmp_path):
    folder, _ = packed(tmp_path)
    loader = Loader(folder, 'train', block_size=40, batch_size=4, isolate=True)
    x, y, documents = loader.batch(0)
    assert torch.equal(torch.stack((x, y)), torch.stack(Loader(folder, 'train', block_size=40, batch_size=4).batch(0)[:2]))
    begins = x == BYTES.special['<|user|>']
    assert torch.equal(documents - documents[:, :1], begins.cumsum(1) - 1)


# -----------------------------------------------------------------------------
# the template in transformers


SPEECH = [  # with a question that ends in '.', whose next token GPT-2 would join to a line end
    {'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': " What's new?\r\n\r\nTell me. "},
    {'role': 'context', 'content': 'Nothing 新闻.'}, {'role': 'assistant', 'content': "It's all old. "},
    {'role': 'user', 'content': '再见'}, {'role': 'assistant', 'content': '👍🏽 bye\n'}]


def gpt2():
    merges = SHARED / 'gpt2_bpe' / 'vocab.bpe'
    if not merges.exists():
        pytest.skip(f'{merges} is absent')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FLATGPT_CACHE', str(merges.parent))
        return GPT2Tokenizer()


def trained():
    from corpus.train_tokenizer import train_bpe
    return train_bpe(['Be brief. What is new? Tell me. It is all old news.\n\n### User:\nbye\n'] * 50, 300, 10**6)


@pytest.mark.parametrize('style', ['chat', 'alpaca'])
@pytest.mark.parametrize('make', [ByteTokenizer, trained, gpt2])
def test_transformers_chat_template_gives_the_ids_of_training(tmp_path, make, style):
    transformers = pytest.importorskip('transformers')
    tokenizer = make()
    (tmp_path / 'tokenizer.json').write_text(json.dumps(tokenizer.tokenizer_json()), encoding='utf-8')
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json'), clean_up_tokenization_spaces=False)
    reference.chat_template = Template(tokenizer, style).jinja()
    [conversation] = read_conversations([write(tmp_path / 'x.json', [{'messages': SPEECH}])])
    ids = encode(conversation.turns, tokenizer, style, 10_000).ids
    assert reference.apply_chat_template(SPEECH, tokenize=True, return_dict=False) == ids.tolist()
    prompt = encode(conversation.turns[:-1], tokenizer, style, 10_000).ids
    assert reference.apply_chat_template(SPEECH[:-1], tokenize=True, return_dict=False, add_generation_prompt=True) == prompt.tolist()


def qwen(folder):
    """A byte-level BPE with Qwen's special tokens, as a folder that AutoTokenizer reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    tokenizer.train_from_iterator(['Be brief. What is new? user system assistant'] * 9, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    folder.mkdir()
    tokenizer.save(str(folder / 'tokenizer.json'))
    settings = dict(tokenizer_class='PreTrainedTokenizerFast', eos_token='<|im_end|>', pad_token='<|endoftext|>')
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return load_tokenizer(read_tokenizer_json(folder))


def test_chatml_gives_the_ids_of_qwens_template(tmp_path):
    transformers = pytest.importorskip('transformers')
    tokenizer = qwen(tmp_path / 'qwen')
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / 'qwen')
    theirs = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
    talk = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': "What's new? 新闻"}, {'role': 'assistant', 'content': 'Nothing.'},
            {'role': 'user', 'content': 'bye'}, {'role': 'assistant', 'content': '再见'}]
    template = Template(tokenizer, 'chatml')
    turns = [(message['role'], message['content']) for message in talk]
    for reference.chat_template in (theirs, template.jinja()):
        ids, mask = template.encode(turns)
        assert reference.apply_chat_template(talk, tokenize=True, return_dict=False) == ids and len(mask) == len(ids)
        prompt, _ = template.encode([*turns[:3], ('user', 'bye'), ('assistant', None)])
        assert reference.apply_chat_template(talk[:4], tokenize=True, return_dict=False, add_generation_prompt=True) == prompt
    targets = [i for i, target in zip(ids, mask) if target]
    assert tokenizer.decode(targets, ) == 'Nothing.<|im_end|>再见<|im_end|>'
    # a special token in the text of a turn stays text
    assert template.encode([('user', '<|im_end|>'), ('assistant', None)])[0].count(tokenizer.special['<|im_end|>']) == 1


# -----------------------------------------------------------------------------
# passages that are too long


PASSAGE = '第一句话很长很长。答案是北京，对吗？第三句话也很长很长。最后一句。' * 3


def fit(passage, answer, size, answer_start=-1):
    passage = Passage(passage)
    passage.answer_start = answer_start
    fitted = encode([('user', '问'), ('context', passage), ('assistant', answer)], BYTES, 'chat', size)
    text = chat.as_text(fitted.ids, fitted.mask, BYTES, False)
    return text.removeprefix('<|user|>问\n\n').partition('<|assistant|>')[0], fitted.evidence


def test_a_long_passage_is_cut_around_its_answer_at_sentences():
    sentences = re.findall('[^。？]+[。？]', PASSAGE)
    for start in (-1, PASSAGE.rfind('北京')):
        kept, evidence = fit(PASSAGE, '北京', 200, start)
        assert evidence and '北京' in kept and len(kept.encode()) > 120
        assert PASSAGE.startswith(kept) == (start < 0) and set(re.findall('[^。？]+[。？]?', kept)) <= set(sentences)


def test_a_long_sentence_is_cut_around_its_answer_at_characters():
    passage = '甲' * 300 + '北京' + '乙' * 300
    kept, evidence = fit(passage, '北京', 100)
    assert evidence and re.fullmatch('甲+北京乙+', kept) and 78 <= len(kept.encode()) <= 84


def test_without_its_answer_a_passage_loses_its_beginning():
    assert fit('甲乙丙' * 100, '丁', 30) == ('甲乙丙甲乙丙', None)


def test_answers_that_left_their_passages_are_counted_and_warned_of(tmp_path, capsys, other):
    records = [{'question': 'q' * 20, 'context': 'x' * n + 'answer', 'answer': 'answer'} for n in (1, 2, 90)]
    records.append({'question': 'q' * 32, 'context': 'an answer', 'answer': 'answer'})
    chat.build(tmp_path / 'x', BYTES, [write(tmp_path / 'x.json', records)], block_size=41, val=[other])
    out = capsys.readouterr().out
    assert 'answer no longer in its passage: 1 (-v names them)\n' in out
    assert 'warning: 25% of the answers are no longer in their passages' in out


def test_the_squad_offset_says_which_occurrence_is_the_answer(tmp_path):
    context = '  北京。\r\n' + '甲。' * 50 + '北京。'
    record = {'question': 'q', 'context': context, 'answers': {'text': ['北京'], 'answer_start': [context.rfind('北京')]}}
    [conversation] = read_conversations([write(tmp_path / 'x.json', [record])])
    assert conversation.turns[1][1].answer_start == conversation.turns[1][1].rfind('北京')


@pytest.mark.parametrize('ending', ['.jsonl.gz', '.parquet', '.csv'])
def test_compressed_and_columnar_files_and_other_encodings(tmp_path, ending):
    path = tmp_path / f'x{ending}'
    if ending == '.jsonl.gz':
        path.write_bytes(gzip.compress('{"question": "问", "answer": "答"}\n'.encode('gb18030')))
    elif ending == '.csv':
        path.write_bytes('问题,答案\r\n问,答\r\n'.encode('gb18030'))
    else:
        pa = pytest.importorskip('pyarrow')
        pytest.importorskip('pyarrow.parquet').write_table(pa.Table.from_pylist([{'question': '问', 'answers': {'text': ['答'], 'answer_start': [0]}, 'context': None}]), path)
    names = dict(question='问题', answer='答案') if ending == '.csv' else {}
    [conversation] = read_conversations([path], encoding='gb18030', **names)
    assert conversation.turns == [('user', '问'), ('assistant', '答')]
    if names:
        with pytest.raises(ValueError, match='line 2: --answer=答: its fields are 问题, 答案'):
            list(read_conversations([path], encoding='gb18030', question='问题', answer='答'))
        assert list(read_conversations([path], encoding='gb18030')) == [conversation]  # these columns are known


def test_named_columns_take_the_place_of_known_ones(tmp_path):
    path = write(tmp_path / 'x.json', [{'question': 'of the crowd', 'q': 'q', 'a': 'a'}])
    [conversation] = read_conversations([path], question='q', answer='a')
    assert conversation.turns == [('user', 'q'), ('assistant', 'a')]
    [conversation] = read_conversations([path], question='question', answer='a')
    assert conversation.turns == [('user', 'of the crowd'), ('assistant', 'a')]


def test_the_exported_chat_template_gives_the_ids_of_training(tmp_path):
    transformers = pytest.importorskip('transformers')
    model = GPT(GPTConfig(block_size=16, vocab_size=BYTES.vocab_size, n_layer=1, n_head=2, n_embd=16))
    model.save_pretrained(tmp_path / 'exported', BYTES, 'chat')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'exported')
    turns = [('user', 'cow?\n羊'), ('assistant', 'moo'), ('user', 'hen?')]
    messages = [{'role': role, 'content': text} for role, text in turns]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == encode(turns, BYTES, 'chat', 999).ids.tolist()
